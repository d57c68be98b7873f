"""Who deserves what: from grades to the advantage of every answer, or of every token.

P prompts, G siblings sampled from each; T tokens of a trajectory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from posttrain import objectives
from posttrain.core import ConfigError, Example, Grade, StopReason, TokenSequence, Trajectory
from posttrain.recipes.rl_settings import Grpo
from posttrain.rollout import Group, Rolled
from posttrain.train import Trainer

TokenKl = Mapping[str, Sequence[float]]
"""By trajectory id, T estimates of the KL to the reference, 0 where the policy did not write the token."""


def rewards_of(groups: Sequence[Group], grades: Sequence[Grade], config: Grpo) -> Tensor:
    """Scores less the penalties for length and for not ending, PG; NaN where the rollout or its grade failed."""
    scores = [math.nan if grade.score is None else grade.score for grade in grades]
    rewards_PG = torch.tensor(scores, dtype=torch.float64).view(len(groups), config.group_size)
    answers = [trajectory for group in groups for trajectory in group.trajectories]
    if config.eos_penalty:
        ended_PG = torch.tensor([answer.stop_reason is not StopReason.LENGTH for answer in answers]).view_as(rewards_PG)
        rewards_PG = objectives.missing_eos_penalty(rewards_PG, ended_PG, config.eos_penalty)
    if config.over_long_buffer:
        lengths_PG = torch.tensor([answer.num_completion_tokens() for answer in answers]).view_as(rewards_PG)
        rewards_PG = rewards_PG + objectives.over_long_penalty(
            lengths_PG, max_length=config.max_tokens, buffer=config.over_long_buffer
        )
    return rewards_PG


def advantages_of(
    groups: Sequence[Group], grades: Sequence[Grade], config: Grpo, *, token_kl: TokenKl | None = None
) -> list[list[float | Sequence[float] | None]]:
    """Each group's advantages, by sibling; None where the rollout or its grade failed.

    Args:
        groups: a step's groups, each of `config.group_size`.
        grades: one for each trajectory.
        config: `advantage` says how answers are compared.
        token_kl: with `kl_in_reward`: what every token has spent. REINFORCE++ then gives T advantages for each answer,
            the others take an answer's whole KL off its reward.
    """
    rewards_PG = rewards_of(groups, grades, config)
    valid_PG = ~rewards_PG.isnan()
    if token_kl is not None:
        if config.advantage in ("reinforce_pp", "reinforce_pp_baseline"):
            return _token_advantages(groups, rewards_PG, valid_PG, config, token_kl)
        answers = [trajectory for group in groups for trajectory in group.trajectories]
        spent_PG = torch.tensor([math.fsum(token_kl.get(answer.id, ())) for answer in answers]).view_as(rewards_PG)
        rewards_PG = rewards_PG - config.beta * spent_PG
    advantages_PG = _advantages(rewards_PG, valid_PG, grades, config)
    return [
        [value if valid else None for value, valid in zip(*pair, strict=True)]
        for pair in zip(advantages_PG.tolist(), valid_PG.tolist(), strict=True)
    ]


def _advantages(rewards_PG: Tensor, valid_PG: Tensor, grades: Sequence[Grade], config: Grpo) -> Tensor:
    match config.advantage:
        case "group":
            return objectives.group_advantages(rewards_PG, std=config.scale_rewards, valid_PG=valid_PG)
        case "group_batch_std":
            return objectives.batch_scaled_advantages(rewards_PG, valid_PG=valid_PG)
        case "rloo":
            return objectives.leave_one_out(rewards_PG, valid_PG=valid_PG)
        case "reinforce":
            return objectives.reinforce_advantages(rewards_PG, valid_PG=valid_PG)
        case "reinforce_pp" | "reinforce_pp_baseline":
            own = config.advantage == "reinforce_pp_baseline"
            return objectives.reinforce_pp_advantages(rewards_PG, group_baseline=own, valid_PG=valid_PG)
        case "max_rl":
            return objectives.max_rl_advantages(rewards_PG, valid_PG=valid_PG)
        case "decoupled":
            parts_KPG = _parts(rewards_PG, valid_PG, grades)
            return objectives.decoupled_advantages(parts_KPG, torch.ones(len(parts_KPG)), valid_PG=valid_PG)


def _parts(rewards_PG: Tensor, valid_PG: Tensor, grades: Sequence[Grade]) -> Tensor:
    """The parts of every grade, KPG, and what length and end have cost as one more where it is not 0."""
    names = sorted({name for grade in grades for name in grade.parts})
    lacking = [grade.grader for grade in grades if grade.score is not None and grade.parts.keys() != set(names)]
    if not names or lacking:
        raise ConfigError(
            "advantage 'decoupled' needs the same named parts in every grade, but "
            f"{lacking[0] if lacking else 'the grader'} gives others or none: combine graders with grade.Weighted"
        )
    values = [[grade.parts.get(name, math.nan) for grade in grades] for name in names]
    parts_KPG = torch.tensor(values, dtype=torch.float64).view(len(names), *rewards_PG.shape)
    scores = [math.nan if grade.score is None else grade.score for grade in grades]
    penalty_PG = rewards_PG - torch.tensor(scores, dtype=torch.float64).view_as(rewards_PG)
    return torch.cat([parts_KPG, penalty_PG[None]]) if penalty_PG[valid_PG].any() else parts_KPG


def _token_advantages(
    groups: Sequence[Group], rewards_PG: Tensor, valid_PG: Tensor, config: Grpo, token_kl: TokenKl
) -> list[list[float | Sequence[float] | None]]:
    """REINFORCE++: what is left to come, reward at the end and KL on the way, whitened over the step's tokens."""
    if config.advantage == "reinforce_pp_baseline":
        rewards_PG = objectives.group_advantages(rewards_PG, std=False, valid_PG=valid_PG)
    answers = [trajectory for group in groups for trajectory in group.trajectories]
    usable = [
        (answer, reward)
        for answer, reward, valid in zip(
            answers, rewards_PG.flatten().tolist(), valid_PG.flatten().tolist(), strict=True
        )
        if valid and any(answer.mask)
    ]
    lengths_S = torch.tensor([answer.num_completion_tokens() for answer, _ in usable])
    sequence_N = torch.arange(len(usable)).repeat_interleave(lengths_S)
    scores_S = torch.tensor([reward for _, reward in usable], dtype=torch.float64)
    kl_N = torch.tensor([kl for answer, _ in usable for kl in _written(answer, token_kl[answer.id])])
    rewards_N = objectives.token_rewards(scores_S, sequence_N) - config.beta * kl_N
    whitened_N = objectives.whiten(objectives.discounted_returns(rewards_N, sequence_N, len(usable)))
    by_id = {
        answer.id: _spread(answer, part_N.tolist())
        for (answer, _), part_N in zip(usable, torch.split(whitened_N, lengths_S.tolist()), strict=True)
    }
    return [
        [
            by_id.get(trajectory.id, 0.0) if valid else None
            for trajectory, valid in zip(group.trajectories, row, strict=True)
        ]
        for group, row in zip(groups, valid_PG.tolist(), strict=True)
    ]


def _written(answer: Trajectory, values_T: Sequence[float]) -> list[float]:
    return [value for value, wrote in zip(values_T, answer.mask, strict=True) if wrote]


def _spread(answer: Trajectory, values: Sequence[float]) -> list[float]:
    """Values of the tokens that the policy wrote, at their places among all T."""
    rest = iter(values)
    return [next(rest) if wrote else 0.0 for wrote in answer.mask]


def spent_on(examples: Sequence[Example], config: Grpo) -> dict[str, list[float]]:
    """`TokenKl` of examples with the columns `old_logprobs` and `ref_logprobs`."""
    spent = {}
    for example in examples:
        (sequence,) = example.sequences
        own_T, their_T = (torch.tensor(sequence.columns[name]) for name in ("old_logprobs", "ref_logprobs"))
        spent[example.id] = objectives.kl_estimate(own_T.double(), their_T.double(), config.kl_estimator).tolist()
    return spent


def scores_of(examples: Sequence[Example], rolled: Sequence[Rolled], eos_penalty: float) -> Tensor:
    """What each example's answer is worth, less the penalty of one that did not end; float64."""
    scores, ended = {}, {}
    for one in rolled:
        for trajectory, grade in zip(one.group.trajectories, one.grades, strict=True):
            scores[trajectory.id] = math.nan if grade.score is None else grade.score
            ended[trajectory.id] = trajectory.stop_reason is not StopReason.LENGTH
    ids = [example.id for example in examples]
    scores_S = torch.tensor([scores[name] for name in ids], dtype=torch.float64)
    return objectives.missing_eos_penalty(scores_S, torch.tensor([ended[name] for name in ids]), eos_penalty)


def with_column(examples: Sequence[Example], name: str, trainer: Trainer) -> list[Example]:
    """The examples with what a trainer says of every target as a column: logprobs, values, entropies."""
    return [
        example.replace(
            sequences=tuple(
                _with(sequence, name, column) for sequence, column in zip(example.sequences, columns, strict=True)
            )
        )
        for example, columns in zip(examples, trainer.logprobs(examples), strict=True)
    ]


def with_columns_of(examples: Sequence[Example], others: Sequence[Example], *names: str) -> list[Example]:
    """The examples with columns of others of the same ids, which hold the same tokens."""
    known = {other.id: other.sequences for other in others}
    return [
        example.replace(
            sequences=tuple(
                sequence.replace(columns={**sequence.columns, **{name: other.columns[name] for name in names}})
                for sequence, other in zip(example.sequences, known[example.id], strict=True)
            )
        )
        for example in examples
    ]


def with_reference(examples: Sequence[Example], reference: Trainer) -> list[Example]:
    """The examples with the reference's logprobs as the column `ref_logprobs`."""
    return with_column(examples, "ref_logprobs", reference)


def _with(sequence: TokenSequence, name: str, column: tuple[float, ...]) -> TokenSequence:
    return sequence.replace(columns={**sequence.columns, name: column})
