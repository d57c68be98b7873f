"""Preferences as papers collect them: several answers to a prompt, rated; pairs of better and worse; who won how often.

A grader stands for the people or the judge who rate. One that scores answers one by one ranks any number of them; a
pairwise judge (`grade.PairwiseJudge`) is asked about two.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from posttrain.core import (
    Grader,
    Interval,
    Record,
    Sampling,
    StopReason,
    Task,
    Trajectory,
    UsageError,
    assistant,
    derive_seed,
    generator,
    read_jsonl,
)
from posttrain.data import CompletionRow, Content, PreferenceRow
from posttrain.evaluate import bootstrap_mean
from posttrain.grade import PairwiseJudge, check_failures, grade_all
from posttrain.recipes.best_of import Kept
from posttrain.recipes.policy import load_policy
from posttrain.recipes.workbench import Workbench
from posttrain.registry.durable import write_atomic
from posttrain.rollout import check_failures as check_rollouts
from posttrain.rollout import run_groups


class RatedAnswer(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model's answer and what it was rated."""

    model: str  # which of the models, as the recipe calls it
    text: str
    score: float | None  # None: not rated, or no answer (empty, cut at the token limit, a failure)


class Rated(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="rated/1"):
    """A prompt with all its answers."""

    task: Task
    answers: tuple[RatedAnswer, ...]


class Asking(NamedTuple):
    """How answers are sampled."""

    samples: int  # of each model, per prompt
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    slots: int = 128
    seed: int = 0
    device: str = "cpu"
    max_failed: float = 0.05


def rated_answers(
    bench: Workbench, name: str, models: Mapping[str, Path], tasks: Sequence[Task], rater: Grader, asking: Asking
) -> list[Rated]:
    """Every model's answers to every prompt, rated; kept in `<run>/data/<name>.jsonl`, and read after a resume.

    Of a pairwise judge's verdict on the two answers to a prompt the winner gets 1, the other 0, both ½ for a tie.

    Raises:
        RolloutError, GradeError: too many failed.
        UsageError: a pairwise judge with more than two answers to a prompt.
    """
    path = bench.run.path / "data" / f"{name}.jsonl"
    if not path.exists():
        if isinstance(rater, PairwiseJudge) and len(models) * asking.samples != 2:
            raise UsageError(
                f"a pairwise judge compares 2 answers, not {len(models) * asking.samples}; give a grader that scores"
            )
        asked = {label: asyncio.run(_answers(bench, folder, label, tasks, asking)) for label, folder in models.items()}
        by_task = [
            [(label, answer) for label, groups in asked.items() for answer in groups[place]]
            for place in range(len(tasks))
        ]
        rated = asyncio.run(_rated(tasks, by_task, rater, asking))
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, b"".join(one.to_json() + b"\n" for one in rated))
    return read_jsonl(path, Rated)


def best_and_lower(rated: Sequence[Rated], *, seed: int, min_gap: float = 0.0) -> list[PreferenceRow]:
    """Of each prompt the best answer as chosen, and one of those rated lower, drawn by the seed, as rejected.

    Prompts whose answers are rated alike, or of which fewer than two are rated, give no pair.

    Args:
        rated: from `rated_answers`.
        seed: of the draw, and of ties at the top.
        min_gap: lowest difference of the two scores; what is nearly alike teaches little.
    """
    pairs = []
    for one in rated:
        draw = generator(derive_seed(seed, "pair", one.task.id))
        scored = [(answer.score, answer.text) for answer in one.answers if answer.score is not None]
        top = max((score for score, _ in scored), default=0.0)
        lower = [(score, text) for score, text in scored if score < top and top - score >= min_gap]
        if not lower:
            continue
        chosen = draw.choice([text for score, text in scored if score == top])
        low, rejected = draw.choice(lower)
        pairs.append(
            PreferenceRow(
                id=one.task.id,
                prompt=one.task.prompt,
                chosen=as_answer(one.task, chosen),
                rejected=as_answer(one.task, rejected),
                margin=top - low,
                tools=one.task.tools,
            )
        )
    return pairs


def win_rate(rated: Sequence[Rated], new: str, old: str, *, seed: int = 0) -> Interval:
    """How often the new model's answer is rated above the old one's, ties counted half; each prompt once.

    An answer that could not be rated loses to one that could.

    Raises:
        EvaluateError: fewer than two prompts.
    """
    points = []
    for one in rated:
        means = {label: _mean_score(one, label) for label in (new, old)}
        points.append(0.5 + 0.5 * ((means[new] > means[old]) - (means[new] < means[old])))
    return bootstrap_mean(points, seed=seed)


def as_answer(task: Task, text: str) -> Content:
    """A text in the form that answers to this task have: text, or an assistant's turn."""
    return text if isinstance(task.prompt, str) else (assistant(text),)


def completion_of(kept: Kept) -> CompletionRow:
    """An answer that was kept, as a row to imitate."""
    task = kept.trajectory.task
    completion = as_answer(task, kept.trajectory.text)
    return CompletionRow(id=kept.trajectory.id, prompt=task.prompt, completion=completion, tools=task.tools)


def _mean_score(one: Rated, label: str) -> float:
    scores = [answer.score for answer in one.answers if answer.model == label and answer.score is not None]
    return sum(scores) / len(scores) if scores else float("-inf")


async def _answers(
    bench: Workbench, folder: Path, label: str, tasks: Sequence[Task], asking: Asking
) -> list[tuple[Trajectory, ...]]:
    """One model's answers to each task."""
    policy = load_policy(str(folder), device=asking.device)
    sampling = Sampling(
        max_tokens=asking.max_tokens,
        temperature=asking.temperature,
        top_p=asking.top_p,
        n=asking.samples,
        stop_tokens=tuple(sorted(policy.renderer.stop_tokens)),
    )
    slots = min(asking.slots, len(tasks) * asking.samples)
    batch = max(1, 2 * slots // asking.samples)
    groups = []
    length = policy.length_for(tasks, asking.max_tokens)
    with (
        policy.engine(slots=slots, length=length, seed=asking.seed, inline=True) as engine,
        bench.progress(f"answers of {label}", len(tasks)) as progress,
    ):
        for start in range(0, len(tasks), batch):
            part = tasks[start : start + batch]
            seed = derive_seed(asking.seed, "rated", label)
            groups += await run_groups(engine, part, sampling, prompt_tokens=policy.renderer.prompt, seed=seed)
            progress.advance({}, by=len(part))
    check_rollouts(groups, asking.max_failed)
    return [group.trajectories for group in groups]


async def _rated(
    tasks: Sequence[Task], by_task: Sequence[Sequence[tuple[str, Trajectory]]], rater: Grader, asking: Asking
) -> list[Rated]:
    usable = [[answer for _, answer in own if _says_something(answer)] for own in by_task]
    scores: dict[int, float] = {}  # by identity: two models may give answers of one id
    if isinstance(rater, PairwiseJudge):
        shown = [
            answer.replace(task=answer.task.replace(facts={**answer.task.facts, "opponent": other.text}))
            for answer, other in (own for own in usable if len(own) == 2)
        ]
        grades = iter(await grade_all(rater, shown))
        graded = [(own, next(grades)) for own in usable if len(own) == 2]
        check_failures([grade for _, grade in graded], asking.max_failed)
        scores = {id(own[0]): 1.0 for own in usable if len(own) == 1}  # the only one that says something
        for (answer, other), grade in graded:
            if grade.score is not None:
                scores |= {id(answer): grade.score, id(other): 1.0 - grade.score}
    else:
        flat = [answer for own in usable for answer in own]
        found = await grade_all(rater, flat)
        check_failures(found, asking.max_failed)
        scores = {id(a): grade.score for a, grade in zip(flat, found, strict=True) if grade.score is not None}
    return [
        Rated(
            task=task,
            answers=tuple(
                RatedAnswer(model=label, text=answer.text, score=scores.get(id(answer))) for label, answer in own
            ),
        )
        for task, own in zip(tasks, by_task, strict=True)
    ]


def _says_something(answer: Trajectory) -> bool:
    cut = answer.failed() or answer.stop_reason is StopReason.LENGTH
    return not cut and bool(answer.text.strip())
