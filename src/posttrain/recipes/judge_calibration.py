"""Hold a judge against people's labels before anything is tuned or promoted by its verdicts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import msgspec

from posttrain.core import Grade, Grader, Task, UsageError, content_hash, recipe
from posttrain.evaluate import JudgeCalibration, JudgedAnswer, JudgedPair, calibrate_answers, calibrate_pairs
from posttrain.evaluate.judge_calibration import Vote
from posttrain.grade import Function, PairVerdict, grade_all, prove, trajectory_from_text
from posttrain.recipes.grading import grader_from
from posttrain.recipes.judge_labels import LabelledAnswer, LabelledPair, read_labels
from posttrain.recipes.workbench import RUNS, open_workbench


@runtime_checkable
class ComparesAnswers(Protocol):
    """A judge of pairs. `posttrain.grade.PairwiseJudge` is one."""

    async def compare(self, task: Task, a: str, b: str, *, id: str = "") -> PairVerdict:
        """Which answer is better."""
        ...


async def judge_pairs(judge: Grader, pairs: Sequence[LabelledPair], concurrency: int = 32) -> list[JudgedPair]:
    """The judge's verdict on each pair; a judge of single answers prefers the one that it scores higher."""
    if isinstance(judge, ComparesAnswers):
        verdicts = await _compared(judge, pairs, concurrency)
    else:
        both = [(pair, text) for pair in pairs for text in (pair.a, pair.b)]
        asked = [trajectory_from_text(p.task, text, id=f"{p.id}/{n % 2}") for n, (p, text) in enumerate(both)]
        grades = await grade_all(judge, asked, concurrency=concurrency)
        verdicts = [_higher(*two) for two in zip(grades[::2], grades[1::2], strict=True)]
    return [
        JudgedPair(
            id=pair.id,
            prompt=content_hash(pair.task.prompt)[:16],
            votes=pair.votes,
            judge=verdict.winner,
            in_order=verdict.in_order,
            swapped=verdict.swapped,
            length_a=len(pair.a),
            length_b=len(pair.b),
        )
        for pair, verdict in zip(pairs, verdicts, strict=True)
    ]


async def _compared(judge: ComparesAnswers, pairs: Sequence[LabelledPair], concurrency: int) -> list[PairVerdict]:
    places = asyncio.Semaphore(concurrency)

    async def one(pair: LabelledPair) -> PairVerdict:
        async with places:
            return await judge.compare(pair.task, pair.a, pair.b, id=pair.id)

    return list(await asyncio.gather(*(one(pair) for pair in pairs)))


def _higher(first: Grade, second: Grade) -> PairVerdict:
    if first.score is None or second.score is None:
        return PairVerdict(winner=None, error=first.error or second.error)
    winner: Vote = "tie" if first.score == second.score else "a" if first.score > second.score else "b"
    return PairVerdict(winner=winner)


async def judge_answers(
    judge: Grader, answers: Sequence[LabelledAnswer], threshold: float = 0.5, concurrency: int = 32
) -> list[JudgedAnswer]:
    """The judge's verdict on each answer: right from `threshold` on."""
    asked = [trajectory_from_text(answer.task, answer.text, id=answer.id) for answer in answers]
    grades = await grade_all(judge, asked, concurrency=concurrency)
    return [
        JudgedAnswer(
            id=answer.id,
            prompt=content_hash(answer.task.prompt)[:16],
            votes=answer.votes,
            judge=None if grade.score is None else grade.score >= threshold,
        )
        for answer, grade in zip(answers, grades, strict=True)
    ]


def calibration_table(report: JudgeCalibration) -> str:
    """The report for a person at a terminal."""
    head = (
        f"{report.judge} on {report.data}: {report.num_items} items, {report.num_votes} votes, "
        f"{report.num_prompts} prompts, {report.num_failed} without a verdict"
    )
    width = max((len(name) for name in report.metrics), default=0)
    rows = [f"  {name:<{width}}  {m.value:+.3f}  [{m.low:+.3f}, {m.high:+.3f}]" for name, m in report.metrics.items()]
    return "\n".join([head, *rows, *(f"  no {name}: {why}" for name, why in report.left_out.items())])


def baseline_longer() -> Grader:
    """A judge that prefers the longer answer: what any judge of pairs should beat."""
    return Function(lambda trajectory: float(len(trajectory.text)), "longer")


@recipe
def judge_calibration(
    *,
    data: Path,
    judge: str,
    limit: int | None = None,
    threshold: float = 0.5,
    confidence: float = 0.95,
    concurrency: int = 32,
    proof: bool = False,
    seed: int = 0,
    runs: Path = RUNS,
    resume: Path | None = None,
) -> JudgeCalibration:
    """Compare a judge with people's labels: agreement beyond chance, position, length, right and wrong.

    Args:
        data: human labels: pairs with votes (PandaLM's and LLMBar's columns are known), or answers called right or
            wrong.
        judge: judge:URL#MODEL[,FILE.toml], FILE.py:NAME, any other grader, or `longer`: the longer answer is better.
        limit: the first so many rows.
        threshold: from which score an answer counts as right, where single answers are judged.
        confidence: of the intervals.
        concurrency: items judged at the same time.
        proof: have the judge prove itself on its own cases first, and stop where it does not.
        seed: of the resampling.
        runs: folder of runs.
        resume: not used: a calibration begins anew.
    """
    options = dict(locals())
    grader = baseline_longer() if judge == "longer" else grader_from(judge)
    labels = read_labels(data, limit)
    named = {"judge": judge, "data": data.name, "seed": seed, "confidence": confidence}
    if proof:
        prove(grader, deadline_s=300.0).raise_for_problems()
    with open_workbench("judge_calibration", options, runs=runs) as bench:
        if isinstance(labels[0], LabelledPair):
            pairs = asyncio.run(judge_pairs(grader, [p for p in labels if isinstance(p, LabelledPair)], concurrency))
            (bench.run.path / "verdicts.jsonl").write_bytes(b"".join(pair.to_json() + b"\n" for pair in pairs))
            report = calibrate_pairs(pairs, **named)  # type: ignore[arg-type]
        else:
            if isinstance(grader, ComparesAnswers):
                raise UsageError(f"{data} holds single answers, and {judge!r} compares two; give another judge")
            singles = [answer for answer in labels if isinstance(answer, LabelledAnswer)]
            answers = asyncio.run(judge_answers(grader, singles, threshold, concurrency))
            (bench.run.path / "verdicts.jsonl").write_bytes(b"".join(answer.to_json() + b"\n" for answer in answers))
            report = calibrate_answers(answers, **named)  # type: ignore[arg-type]
        report = report.replace(settings={"rows": content_hash(msgspec.to_builtins(labels))[:16], "data": str(data)})
        (bench.run.path / "report.json").write_bytes(report.to_json())
        bench.say(calibration_table(report))
        bench.say(f"report in {bench.run.path / 'report.json'}")
        return report
