"""Run a suite: sample answers, grade them, and say how good they are and how sure that is."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from posttrain.core import (
    EvalReport,
    EvalSample,
    EvaluateError,
    Grade,
    SampleTokens,
    Sampling,
    Task,
    Trajectory,
    derive_seed,
)
from posttrain.evaluate.scores import report_metrics
from posttrain.evaluate.suite import Suite
from posttrain.grade import grade_all
from posttrain.rollout import run_groups

PromptTokens = Callable[[Task], Sequence[int]]
Done = Callable[[int, int], None]


async def run_suite(
    suite: Suite,
    sampler: SampleTokens,
    prompt_tokens: PromptTokens,
    *,
    model: str,
    batch: int = 256,
    deadline_s: float = 30.0,
    confidence: float = 0.95,
    seed: int = 0,
    on_progress: Done | None = None,
    partial: Path | None = None,
) -> EvalReport:
    """Evaluate a model on a suite.

    A rollout or a grade that fails is an answer that is wrong, counted in `num_failed`.

    Args:
        sampler: gives tokens for tokens.
        prompt_tokens: a task's prompt as token ids (the renderer's work).
        model: what was evaluated: the artifact's id, so that the promotion gate can tell whose report this is.
        batch: prompts handed to the sampler at a time.
        deadline_s: seconds that one grade may take.
        seed: of the sampling, where the suite's sampling names none; the answers do not depend on `batch`.
        on_progress: called with tasks done and tasks in all.
        partial: file that keeps every batch's graded answers as JSON lines; what it holds is not sampled again, so an
            evaluation that was interrupted goes on. It belongs to one model, suite and seed.

    Raises:
        EvaluateError: nothing at all could be graded; names the most frequent causes.
    """
    begun = time.monotonic()
    samples = [] if partial is None else _kept(partial, suite)
    answered = {sample.task.id for sample in samples}
    tasks = [task for task in suite.tasks if task.id not in answered]
    for start in range(0, len(tasks), batch):
        part = tasks[start : start + batch]
        trajectories = await _answer(sampler, part, suite.sampling, prompt_tokens, seed)
        grades = await grade_all(suite.grader, trajectories, deadline_s=deadline_s)
        fresh = [_sample(trajectory, grade) for trajectory, grade in zip(trajectories, grades, strict=True)]
        if partial is not None:
            _keep(partial, fresh)
        samples += fresh
        if on_progress is not None:
            on_progress(len(suite.tasks) - max(len(tasks) - start - batch, 0), len(suite.tasks))
    order = {task.id: place for place, task in enumerate(suite.tasks)}
    samples.sort(key=lambda sample: (order[sample.task.id], sample.index))
    failed = [sample.grade.error or "" for sample in samples if sample.grade.score is None]
    if len(failed) == len(samples):
        causes = "; ".join(f"{count} × {cause[:200]}" for cause, count in Counter(failed).most_common(3))
        raise EvaluateError(f"suite {suite.name!r}: none of {len(samples)} answers could be graded: {causes}")
    return EvalReport(
        suite=suite.name,
        suite_hash=suite.suite_hash,
        model=model,
        sampling=suite.sampling,
        metrics=report_metrics(samples, suite.ks(), confidence),
        samples=tuple(samples),
        num_failed=len(failed),
        seconds=time.monotonic() - begun,
        num_tokens=sum(sample.num_tokens for sample in samples),
    )


def run_suite_sync(
    suite: Suite, sampler: SampleTokens, prompt_tokens: PromptTokens, *, model: str, **options: Any
) -> EvalReport:
    """`run_suite` for scripts; works inside a running event loop (a notebook) too. Takes the same options."""
    work = run_suite(suite, sampler, prompt_tokens, model=model, **options)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_run, work).result()


def _run(work: Coroutine[Any, Any, EvalReport]) -> EvalReport:
    return asyncio.run(work)


async def _answer(
    sampler: SampleTokens, tasks: Sequence[Task], sampling: Sampling, prompt_tokens: PromptTokens, seed: int
) -> list[Trajectory]:
    """Each task's n trajectories, in order. What a task draws depends on the seed and on its id alone."""
    own = derive_seed(seed if sampling.seed is None else sampling.seed, "evaluate")
    groups = await run_groups(sampler, tasks, sampling, prompt_tokens=prompt_tokens, seed=own)
    return [trajectory for group in groups for trajectory in group.trajectories]


def _kept(partial: Path, suite: Suite) -> list[EvalSample]:
    """The answers of an interrupted evaluation, of tasks that have all their samples; the rest is cut off."""
    if not partial.exists():
        return []
    lines = partial.read_bytes().splitlines(keepends=True)
    found = [EvalSample.from_json(line, str(partial)) for line in lines if line.endswith(b"\n")]
    known = {task.id for task in suite.tasks}
    strangers = [sample.task.id for sample in found if sample.task.id not in known]
    if strangers:
        raise EvaluateError(f"{partial}: holds an answer to {strangers[0]!r}, which suite {suite.name!r} does not have")
    counts = Counter(sample.task.id for sample in found)
    whole = [sample for sample in found if counts[sample.task.id] == suite.sampling.n]
    if len(whole) < len(lines):
        partial.unlink()
        _keep(partial, whole)
    return whole


def _keep(partial: Path, samples: Sequence[EvalSample]) -> None:
    with partial.open("ab") as file:
        file.write(b"".join(sample.to_json() + b"\n" for sample in samples))
        file.flush()
        os.fsync(file.fileno())


def _sample(trajectory: Trajectory, grade: Grade) -> EvalSample:
    return EvalSample(
        task=trajectory.task,
        index=trajectory.index,
        text=trajectory.text,
        grade=grade,
        stop_reason=trajectory.stop_reason,
        num_tokens=trajectory.num_completion_tokens(),
    )
