"""Evaluation of a recipe's stages on a dev and an unseen split: reports kept, paired tests, a table and a page.

What guides a run is measured on `dev` alone. `unseen` is asked once, at the end, when nothing can be decided any more
(Tülu 3, arXiv 2411.15124, section 7): of the models that are in the table, all at once.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.core import Comparison, EvalReport, Grader, JsonlTracker, Sampling, read_metrics
from posttrain.evaluate import Stage, Suite, build_run_report, compare, report_html, run_suite
from posttrain.recipes.paper_data import Splits
from posttrain.recipes.paper_stages import model_id
from posttrain.recipes.policy import load_policy
from posttrain.recipes.workbench import Workbench
from posttrain.registry.durable import write_atomic
from posttrain.render import Renderer, Tokenizer


class Measured(NamedTuple):
    """A model on the way."""

    name: str
    folder: Path


class Evaluation:
    """Evaluates models of one run on its splits, each once.

    Args:
        bench: the recipe's run.
        splits: tasks by split; an empty split is left out.
        grader: of all of them.
        max_tokens: new tokens per answer; greedy.
        device: where models are loaded.
        slots: answers sampled at the same time.
    """

    def __init__(
        self,
        bench: Workbench,
        splits: Splits,
        grader: Grader,
        max_tokens: int,
        *,
        device: str = "cpu",
        slots: int = 128,
    ) -> None:
        self.bench = bench
        self.splits = {name: tasks for name, tasks in splits.items() if tasks}
        self.grader, self.max_tokens, self.device, self.slots = grader, max_tokens, device, slots

    def suite(self, split: str, stops: Collection[int] = ()) -> Suite:
        """A split as a suite; the ids that end a model's turns are its own."""
        sampling = Sampling(max_tokens=self.max_tokens, temperature=0.0, stop_tokens=tuple(sorted(stops)))
        return Suite(split, self.splits[split], sampling, self.grader)

    def dev_suite(self, folder: Path) -> Suite | None:
        """The dev split, for loops that measure a model as they go; None where there is no dev split."""
        if "dev" not in self.splits:
            return None
        return self.suite("dev", Renderer(Tokenizer.from_folder(folder)).stop_tokens)

    def report(self, measured: Measured, split: str) -> EvalReport:
        """A model's report on a split: the one in the registry, or a new one, which is kept there."""
        model, plain = model_id(self.bench, measured.folder), self.suite(split)
        for known in self.bench.registry.reports(model, split):
            if known.suite_hash == plain.suite_hash and known.sampling.replace(stop_tokens=()) == plain.sampling:
                return known
        policy = load_policy(str(measured.folder), device=self.device)
        suite = self.suite(split, policy.renderer.stop_tokens)
        partial = self.bench.run.path / "answers" / f"{split}-{measured.name}.jsonl"
        partial.parent.mkdir(exist_ok=True)
        length = policy.length_for(suite.tasks, self.max_tokens)
        with policy.engine(slots=min(self.slots, len(suite.tasks)), length=length, inline=True) as engine:
            work = run_suite(suite, engine, policy.renderer.prompt, model=model, batch=self.slots, partial=partial)
            report = asyncio.run(work)
        self.bench.registry.add_report(report, model)
        score = report.metrics["accuracy"]
        self.bench.say(
            f"{measured.name}, {split}: accuracy {score.value:.1%} [{score.low:.1%}, {score.high:.1%}] "
            f"on {score.n} tasks"
        )
        return report

    def best(self, candidates: Sequence[Measured]) -> Measured:
        """The candidate with the highest accuracy on dev, the first of equals; without a dev split the first."""
        if "dev" not in self.splits:
            return candidates[0]
        best = max(candidates, key=lambda one: self.report(one, "dev").metrics["accuracy"].value)
        if len(candidates) > 1:
            self.bench.say(f"best of {len(candidates)} on dev: {best.name}")
        return best

    def all_reports(self, models: Sequence[Measured]) -> dict[str, list[EvalReport]]:
        """Every model's report on every split, `unseen` last: call it when nothing is left to decide."""
        return {
            split: [self.report(one, split) for one in models] for split in sorted(self.splits, key="unseen".__eq__)
        }

    def finish(
        self,
        models: Sequence[Measured],
        *,
        title: str,
        notes: Sequence[str] = (),
        curves: Sequence[str] = (),
    ) -> dict[str, list[Comparison]]:
        """Evaluate all models on all splits, print the table, and write `stages.json` and the page.

        Args:
            models: the stages' models from the run's start to its last.
            title: of the page.
            notes: what a reader must know before believing the numbers.
            curves: stages whose metrics are drawn.

        Returns:
            By split, each stage against the one before, and last of all the last against the first.
        """
        reports = self.all_reports(models)
        found = {
            split: [compare(later, earlier) for earlier, later in [*pairwise(own), (own[0], own[-1])]]
            for split, own in reports.items()
        }
        self._print(models, reports, found)
        names = [one.name for one in models]
        named = {
            split: [_named(one, *pair) for one, pair in zip(own, _pairs(names), strict=True)]
            for split, own in found.items()
        }
        self._gather(curves)
        page = build_run_report(
            self.bench.run,
            title=title,
            subtitle="Every stage on dev, which guided the run, and on unseen, which was asked once at its end.",
            stages=[
                Stage(name=f"{one.name} · {split}", report=report)
                for split, own in reports.items()
                for one, report in zip(models, own, strict=True)
            ],
            comparisons=[one for own in named.values() for one in own],
            notes=notes,
            registry=self.bench.registry,
            model=model_id(self.bench, models[-1].folder),
        )
        report_html(page, self.bench.run.report)
        lines = [one.to_json() for own in named.values() for one in own]
        write_atomic(self.bench.run.path / "comparisons.jsonl", b"".join(line + b"\n" for line in lines))
        self.bench.say(f"report: {self.bench.run.report}")
        return found

    def _print(
        self,
        models: Sequence[Measured],
        reports: Mapping[str, Sequence[EvalReport]],
        found: Mapping[str, Sequence[Comparison]],
    ) -> None:
        columns = [part for split in reports for part in (f"{split}, 95 %", "against the stage before")]
        table = Table("stage", *columns, title="accuracy of the stages")
        for place, one in enumerate(models):
            cells = [one.name]
            for split, own in reports.items():
                score = own[place].metrics["accuracy"]
                against = _against(found[split][place - 1]) if place else "–"
                cells += [f"{score.value:.1%} [{score.low:.1%}, {score.high:.1%}]", against]
            table.add_row(*map(Text, cells))
        Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140).print(table)
        for split, tests in found.items():
            self.bench.say(f"{split}: {models[-1].name} against {models[0].name}: {_against(tests[-1])}")

    def _gather(self, stages: Sequence[str]) -> None:
        """The stages' metrics as the run's own, under their names."""
        where = self.bench.run.path / "metrics.jsonl"
        where.unlink(missing_ok=True)
        tracker = JsonlTracker(where)
        for stage in stages:
            own = self.bench.run.path.with_name(f"{self.bench.run.id}-{stage}") / "metrics.jsonl"
            for row in read_metrics(own) if own.exists() else []:
                values = {f"{stage}/{name}": value for name, value in row.items() if name != "step"}
                tracker.log(values, step=int(row["step"]))
        tracker.close()


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    return [*pairwise(names), (names[0], names[-1])]


def _named(found: Comparison, earlier: str, later: str) -> Comparison:
    return found.replace(candidate=later, champion=earlier)


def _against(found: Comparison) -> str:
    gap = found.difference
    return (
        f"{gap.value:+.1%} [{gap.low:+.1%}, {gap.high:+.1%}], {found.wins} won, {found.losses} lost, "
        f"p {found.p_value:.2g}"
    )
