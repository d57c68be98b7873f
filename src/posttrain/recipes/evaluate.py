"""Evaluate a model on a file of tasks: greedy or n samples, every score with its interval, compared where asked."""

from __future__ import annotations

import asyncio
from pathlib import Path

from posttrain import data as rows
from posttrain.core import EvalReport, Sampling, recipe
from posttrain.evaluate import Suite, compare, run_suite
from posttrain.recipes.grading import grader_from
from posttrain.recipes.policy import load_policy
from posttrain.recipes.workbench import RUNS, open_workbench


@recipe
def evaluate(
    *,
    model: str,
    data: Path,
    grader: str = "exact",
    columns: str | None = None,
    chat: bool = False,
    template: Path | None = None,
    limit: int | None = None,
    n: int = 1,
    temperature: float = 0.0,
    max_tokens: int = 256,
    stop: tuple[str, ...] = (),
    tags: tuple[str, ...] = (),
    against: Path | None = None,
    slots: int = 64,
    device: str = "cpu",
    seed: int = 0,
    runs: Path = RUNS,
    resume: Path | None = None,
) -> EvalReport:
    """Evaluate a model on a file of tasks, with intervals.

    Args:
        model: folder of the model, or a Hugging Face name.
        data: tasks: prompts with reference answers, in any format that is recognised.
        grader: exact, number, maths, sql:DATABASE[,DATABASE], or FILE.py:NAME.
        columns: which columns to read, as `prompt=context,answer=continuation`.
        chat: make text prompts a user's turn of the chat template.
        template: a chat template file that replaces the model's own.
        limit: evaluate the first so many tasks.
        n: samples per task; above 1 give a temperature.
        temperature: 0 is greedy.
        max_tokens: new tokens per answer.
        stop: strings that end an answer.
        tags: columns whose values are reported separately.
        against: a report (JSON) of another model on the same tasks, to compare with by a paired test.
        slots: answers sampled at the same time.
        device: cpu, cuda, cuda:0 …
        seed: of the sampling.
        runs: folder of runs.
        resume: run folder to go on with; tasks that were answered and graded are not asked again.
    """
    options = dict(locals())
    with open_workbench("evaluate", options, runs=runs, resume=resume) as bench:
        policy = load_policy(model, device=device, template=template)
        loaded = rows.load(
            data, kind="prompt", columns=columns, limit=limit, quarantine=bench.run.path / "bad_rows.jsonl"
        )
        bench.say(loaded.report.summary())
        tasks = [rows.to_task(row, tags=tags, chat=chat) for row in loaded.rows]
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=temperature,
            n=n,
            stop=stop,
            seed=seed,
            stop_tokens=tuple(sorted(policy.renderer.stop_tokens)),
        )
        suite = Suite(data.name.split(".")[0], tasks, sampling, grader_from(grader))
        card = bench.registry.add_artifact(policy.path, kind="model", name=str(model), storage="reference")
        length = policy.length_for(tasks, max_tokens)
        with (
            policy.engine(slots=slots, length=length, seed=seed) as engine,
            bench.progress("evaluate", len(tasks)) as progress,
        ):
            report = asyncio.run(
                run_suite(
                    suite,
                    engine,
                    policy.renderer.prompt,
                    model=card.id,
                    seed=seed,
                    batch=slots,
                    on_progress=lambda done, _: progress.advance({}, by=done - progress.done),
                    partial=bench.run.path / "answers.jsonl",
                )
            )
        bench.registry.add_run(bench.run)
        bench.registry.add_report(report, card.id)
        (bench.run.path / "report.json").write_bytes(report.to_json())
        for metric, score in report.metrics.items():
            bench.say(f"{metric}: {score.value:.4f} [{score.low:.4f}, {score.high:.4f}] ({score.method}, n={score.n})")
        if report.num_failed:
            bench.say(f"{report.num_failed} answers could not be graded and count as wrong")
        if against is not None:
            other = EvalReport.from_json(against.read_bytes(), str(against))
            found = compare(report, other, seed=seed)
            gap = found.difference
            bench.say(
                f"difference {gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}], "
                f"wins {found.wins}, losses {found.losses}, ties {found.ties}, p = {found.p_value:.4g}"
            )
        bench.say(f"report in {bench.run.path / 'report.json'}")
        return report
