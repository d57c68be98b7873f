"""Our side of the comparison: the local engine, the trainer and the GRPO loop as the recipes use them.

Run by the parent; see `protocol`.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from versus.matmul_peak import matmul_peak
from versus.protocol import Runner, serve
from versus.reward import reward_of

from posttrain import models, objectives
from posttrain.core import Example, Grade, Sampling, Task, TokenSequence, Trajectory
from posttrain.engine import LocalEngine
from posttrain.grade import WatchedGrader
from posttrain.recipes.policy import load_policy
from posttrain.recipes.rl_learner import Learner
from posttrain.recipes.rl_loop import sample_step, sampled_metrics, tokens_of
from posttrain.recipes.rl_settings import Grpo
from posttrain.render import Tokenizer
from posttrain.rollout import PromptStream
from posttrain.train import Objective, TrainConfig, Trainer, nll_objective, preference_objective

LengthOf = Callable[[str, int], int]  # from a request's id and a sibling's index to its tokens


class Ours:
    """A workload that is ready: what to do once, and how it is set."""

    def __init__(
        self, work: Callable[[], float], setting: Mapping[str, Any], before: Callable[[], None] = lambda: None
    ) -> None:
        self._work, self._before = work, before
        self.setting = setting
        self.tried: list[dict[str, Any]] = []

    def run(self) -> dict[str, float]:
        """Do the work once; what `before` does is not timed."""
        self._before()
        started_s = time.perf_counter()
        work = self._work()
        return {"seconds": time.perf_counter() - started_s, "work": work}


def end_at(engine: LocalEngine, length_of: LengthOf) -> None:
    """Let every sibling end at a length of its own, as if it wrote an end-of-sequence token there.

    The lengths of a fair comparison must be the same on both sides, so they cannot be left to the models. Requests
    have one limit for all siblings; the running rows have their own, which is set as a row starts.
    """
    rows = engine._stepper.rows
    start = rows.start

    def start_with_length(slot: int, row: Any, sampling: Sampling, *rest: Any, **named: Any) -> None:
        length = length_of(row.generation.request.id, row.index)
        start(slot, row, sampling.replace(max_tokens=length), *rest, **named)

    rows.start = start_with_length  # type: ignore[method-assign]


def sampling_runner(sizes: Mapping[str, Any], inputs: Mapping[str, Any], dtype: torch.dtype | None) -> Runner:
    """Sample all prompts' siblings at once."""
    engine = _engine(inputs, dtype, slots=min(256, len(inputs["lengths"])), new=sizes["new_tokens"])
    siblings, lengths = sizes["siblings"], inputs["lengths"]
    if sizes["mixed"]:
        end_at(engine, lambda name, index: lengths[int(name) * siblings + index])
    count = iter(range(1 << 30))

    def work() -> float:
        sampling = Sampling(
            max_tokens=sizes["new_tokens"], ignore_eos=True, n=siblings, seed=inputs["seed"] + next(count)
        )
        written = [len(completion.tokens) for completion in engine.generate(inputs["prompts"], sampling)]
        assert written == lengths, "every sibling runs to its length"
        return float(sum(written))

    work()
    return Ours(work, {"dtype": str(dtype), "slots": engine.max_batch})


def turns_runner(sizes: Mapping[str, Any], inputs: Mapping[str, Any], dtype: torch.dtype | None) -> Runner:
    """Conversations that grow turn by turn, their cache kept in between."""
    longest = max(map(len, inputs["prompts"])) + sizes["turns"] * (sizes["new_tokens"] + sizes["user_tokens"])
    kept = len(inputs["prompts"]) * longest
    engine = _engine(inputs, dtype, slots=len(inputs["prompts"]), new=longest, prefix_tokens=kept)
    sampling = Sampling(max_tokens=sizes["new_tokens"], ignore_eos=True)
    count = iter(range(1 << 30))

    def forget() -> None:
        engine.update_weights(None if dtype is None else engine.model, version=next(count))

    def work() -> float:
        talks = [list(prompt) for prompt in inputs["prompts"]]
        written = 0
        for turn in range(sizes["turns"]):
            answers = engine.generate(talks, sampling)
            for talk, user, answer in zip(talks, inputs["user"], answers, strict=True):
                written += len(answer.tokens)
                talk += answer.tokens
                talk += user[turn * sizes["user_tokens"] : (turn + 1) * sizes["user_tokens"]]
        return float(written)

    work()
    return Ours(work, {"dtype": str(dtype), "prefix_tokens": kept}, before=forget)


def first_token_runner(sizes: Mapping[str, Any], inputs: Mapping[str, Any], dtype: torch.dtype | None) -> Runner:
    """One request after the other, each for its first token."""
    engine = _engine(inputs, dtype, slots=1, new=1)
    sampling = Sampling(max_tokens=1, ignore_eos=True)

    def work() -> float:
        for prompt in inputs["prompts"]:
            engine.generate([prompt], sampling)
        return float(len(inputs["prompts"]))

    work()
    return Ours(work, {"dtype": str(dtype)})


class CheapReward:
    """The reward function of the comparison as a grader."""

    name = "cheap"

    async def grade(self, trajectory: Trajectory) -> Grade:
        """A number that costs nothing to find."""
        return Grade(score=reward_of(trajectory.text), grader=self.name)


class Nowhere:
    """Takes a run's metrics and events, and keeps none: nothing is written while the clock runs."""

    @property
    def tracker(self) -> Nowhere:
        """Itself."""
        return self

    def log(self, *rest: Any, **named: Any) -> None:
        """See `core.Tracker`."""

    def event(self, kind: str, **fields: Any) -> None:
        """See `grade.TellsRun`."""


def grpo_runner(sizes: Mapping[str, Any], inputs: Mapping[str, Any], dtype: str) -> Runner:
    """One step of the recipe's loop: move the weights to the sampler, sample, grade, credit, update."""
    policy = load_policy(inputs["folder"])
    siblings, lengths = sizes["siblings"], inputs["lengths"]
    tasks = [Task(id=str(place), prompt=text) for place, text in enumerate(inputs["texts"])]
    config = Grpo(
        steps=1 << 20,
        prompts_per_step=len(tasks),
        group_size=siblings,
        max_tokens=sizes["new_tokens"],
        lr=1e-6,
        kl_every=0,
        dtype=dtype,  # type: ignore[arg-type]
        sampler_dtype=dtype,  # type: ignore[arg-type]
        slots=min(256, len(lengths)),
        seed=inputs["seed"],
    )
    learner, source = Learner(policy.model, config), PromptStream(tasks, config.seed)
    slots = min(config.slots, len(lengths))
    length = policy.length_for(tasks, config.max_tokens)
    engine = policy.engine(slots=slots, length=length, dtype=dtype, seed=config.seed, inline=True)
    end_at(engine, lambda name, index: lengths[int(name.partition("/")[0]) * siblings + index])
    sampling = Sampling(max_tokens=config.max_tokens, n=siblings, ignore_eos=True)
    grader = WatchedGrader(CheapReward(), Nowhere())

    def work() -> float:
        engine.update_weights(policy.model, version=learner.step)
        filled = asyncio.run(sample_step(engine, policy, source, sampling, grader, config))
        learner.learn(filled.kept or filled.dropped)
        sampled_metrics(filled)
        return float(tokens_of(filled))

    work()
    return Ours(work, {"dtype": dtype, "slots": slots, "micro_tokens": config.micro_tokens})


def sft_runner(sizes: Mapping[str, Any], inputs: Mapping[str, Any], dtype: str) -> Runner:
    """All rows once, in `steps` optimiser steps."""
    examples = [
        Example(id=str(place), sequences=(_sequence(row["tokens"], row["mask"]),))
        for place, row in enumerate(inputs["sft"])
    ]
    trainer = _trainer(inputs, dtype, nll_objective)
    return _training(trainer, examples, sizes["steps"], float(sum(example.num_tokens() for example in examples)))


def dpo_runner(sizes: Mapping[str, Any], inputs: Mapping[str, Any], dtype: str) -> Runner:
    """All pairs once, in `steps` optimiser steps; the reference's logprobs are known beforehand."""
    examples = []
    for place, pair in enumerate(inputs["dpo"]):
        sides = [
            _sequence(pair["prompt"] + pair[side], [0] * len(pair["prompt"]) + [1] * len(pair[side]))
            for side in ("chosen", "rejected")
        ]
        examples.append(Example(id=str(place), sequences=tuple(sides)))
    loss = partial(objectives.dpo_losses, beta=0.1)
    trainer = _trainer(inputs, dtype, preference_objective(loss, beta=0.1))
    columns = trainer.logprobs(examples)
    known = [
        example.replace(
            sequences=tuple(
                sequence.replace(columns={"ref_logprobs": logprobs})
                for sequence, logprobs in zip(example.sequences, own, strict=True)
            )
        )
        for example, own in zip(examples, columns, strict=True)
    ]
    return _training(trainer, known, sizes["steps"], float(len(known)))


def _training(trainer: Trainer, examples: Sequence[Example], steps: int, work: float) -> Runner:
    size = -(-len(examples) // steps)
    batches = [examples[start : start + size] for start in range(0, len(examples), size)]

    def run() -> float:
        for batch in batches:
            trainer.step(batch)
        return work

    run()
    return Ours(run, {"dtype": trainer.config.dtype, "micro_tokens": trainer.config.micro_tokens})


def _trainer(inputs: Mapping[str, Any], dtype: str, objective: Objective) -> Trainer:
    config = TrainConfig(lr=1e-6, dtype=dtype)  # type: ignore[arg-type]
    return Trainer(models.load(inputs["folder"]), config, objective)


def _sequence(tokens: Sequence[int], mask: Sequence[int]) -> TokenSequence:
    return TokenSequence(tokens=tuple(tokens), mask=tuple(map(bool, mask)))


def _engine(
    inputs: Mapping[str, Any], dtype: torch.dtype | None, *, slots: int, new: int, prefix_tokens: int = 0
) -> LocalEngine:
    length = max(map(len, inputs["prompts"])) + new
    return LocalEngine(
        models.load(inputs["folder"]),
        Tokenizer.from_folder(inputs["folder"]),
        max_batch=slots,
        max_length=length,
        prefix_tokens=prefix_tokens,
        dtype=dtype,
        inline=True,
    )


def prepare(workload: Mapping[str, Any], inputs: Mapping[str, Any]) -> Runner:
    """Load and warm a workload."""
    name = inputs.get("dtype", "bfloat16")
    sampler = None if name == "float32" else torch.bfloat16
    sizes = workload["sizes"]
    match workload["kind"]:
        case "sampling":
            return sampling_runner(sizes, inputs, sampler)
        case "turns":
            return turns_runner(sizes, inputs, sampler)
        case "first_token":
            return first_token_runner(sizes, inputs, sampler)
        case "grpo":
            return grpo_runner(sizes, inputs, name)
        case "sft":
            return sft_runner(sizes, inputs, name)
        case "dpo":
            return dpo_runner(sizes, inputs, name)
        case kind:
            raise ValueError(f"no such kind of workload: {kind}")


if __name__ == "__main__":
    serve(prepare, matmul_peak)
