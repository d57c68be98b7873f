"""A sampler that knows some sums, a grader that checks them, and reports made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from posttrain.core import (
    Completion,
    EvalReport,
    EvalSample,
    Grade,
    SampleRequest,
    Sampling,
    StopReason,
    Task,
    Trajectory,
)
from posttrain.evaluate import report_metrics


class SumSampler:
    """Prompt tokens (a, b) are answered with a+b, or a+b+1 where `wrong` says so. Every call's size is kept."""

    def __init__(self, wrong: Callable[[SampleRequest, int], bool] = lambda request, index: False) -> None:
        self.wrong = wrong
        self.calls: list[int] = []
        self.seeds: dict[tuple[int, ...], int | None] = {}

    async def sample(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        self.calls.append(len(requests))
        return [[self._one(request, index) for index in range(request.sampling.n)] for request in requests]

    def _one(self, request: SampleRequest, index: int) -> Completion:
        self.seeds[request.prompt] = request.sampling.seed
        a, b = request.prompt
        text = "boom" if (a, b) == (13, 13) else str(a + b + self.wrong(request, index))
        return Completion(
            tokens=tuple(text.encode()),
            logprobs=(-0.5,) * len(text),
            policy_logprobs=(-0.5,) * len(text),
            text=text,
            stop_reason=StopReason.ERROR if (a, b) == (14, 14) else StopReason.EOS,
            error="out of memory" if (a, b) == (14, 14) else None,
            index=index,
        )


class SumGrader:
    """Right where the text is the answer; crashes on "boom"."""

    name = "sum"

    async def grade(self, trajectory: Trajectory) -> Grade:
        if trajectory.text == "boom":
            raise ValueError("cannot read boom")
        return Grade(score=float(trajectory.text == trajectory.task.answer), grader=self.name)


def pair_tokens(task: Task) -> tuple[int, ...]:
    """The prompt "3+4" as tokens (3, 4)."""
    assert isinstance(task.prompt, str)
    return tuple(int(part) for part in task.prompt.split("+"))


def sum_tasks(n: int, **changes: object) -> list[Task]:
    """Sums i+1, tagged even and odd."""
    return [
        Task(id=f"s{i}", prompt=f"{i}+1", answer=str(i + 1), tags=("even" if i % 2 == 0 else "odd",), **changes)  # type: ignore[arg-type]
        for i in range(n)
    ]


def hand_made(
    scores: Sequence[float | Sequence[float | None] | None],
    model: str = "m",
    *,
    suite_hash: str = "h",
    temperature: float = 1.0,
    clusters: Sequence[str] | None = None,
    seed: int | None = None,
) -> EvalReport:
    """A report from a list of scores (one per task; a list of lists: several samples per task; None: failed)."""
    groups = [list(item) if isinstance(item, list | tuple) else [item] for item in scores]
    samples = tuple(
        EvalSample(
            task=Task(id=f"t{i}", prompt=f"q{i}", cluster=clusters[i] if clusters else None),
            index=index,
            text="a",
            grade=Grade(score=score, grader="g") if score is not None else Grade(score=None, grader="g", error="boom"),
            stop_reason=StopReason.EOS,
            num_tokens=3 + i % 3,
        )
        for i, group in enumerate(groups)
        for index, score in enumerate(group)
    )
    n = max(map(len, groups))
    return EvalReport(
        suite="suite",
        suite_hash=suite_hash,
        model=model,
        sampling=Sampling(temperature=temperature, n=n, seed=seed),
        metrics=report_metrics(samples, tuple(range(1, n + 1))),
        samples=samples,
        num_failed=sum(sample.grade.score is None for sample in samples),
    )
