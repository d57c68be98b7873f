"""RunReport: everything that a run's page shows, as records. `page.report_html` draws it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.core import Comparison, EvalReport, EvalSample, Record, read_metrics
from posttrain.evaluate.line_chart import Curve, curves_from_metrics
from posttrain.evaluate.scores import is_right
from posttrain.registry import Lineage, Promotion, Registry, RunFolder

MAX_TASKS = 150
MAX_TEXT = 6000  # characters of one text that the page shows

# Metrics that have a chart of their own, in the order of the page: title → names that share it. Also known behind a
# stage's prefix ("sft/loss").
KNOWN_CHARTS: dict[str, tuple[str, ...]] = {
    "Reward": ("reward",),
    "Reward spread": ("reward_std",),
    "Accuracy": ("accuracy", "eval/accuracy"),
    "Loss": ("loss",),
    "Held-out loss (per token)": ("eval/nll", "eval/loss", "eval_loss"),
    "Token accuracy": ("mean_token_accuracy",),
    "Reward margins": ("rewards/margins",),
    "Completion length (tokens)": ("completions/mean_length",),
    "Clipped completions": ("completions/clipped_ratio",),
    "Entropy": ("entropy",),
    "KL to the reference": ("kl",),
    "Clipped updates": ("clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean"),
    "Groups without signal": ("frac_reward_zero_std",),
    "Sampler–trainer gap (log-prob)": ("sampling/sampling_logp_difference/mean",),
    "Gradient norm": ("grad_norm",),
    "Learning rate": ("lr", "learning_rate"),
}


class Stage(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model on the way: the base, after SFT, after RL …"""

    name: str
    report: EvalReport
    tokens: int | None = None  # trained on (or sampled) to get here
    seconds: float | None = None  # taken to get here
    note: str = ""


class Answer(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model's answer to a shown task."""

    label: str
    text: str
    ok: bool
    score: float | None = None
    parts: dict[str, float] = {}
    rationale: str = ""
    error: str | None = None
    stop_reason: str = ""
    num_tokens: int = 0


class ShownTask(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A task with the answers of one or more models, the newest last."""

    id: str
    prompt: str
    gold: str | None = None
    tags: tuple[str, ...] = ()
    answers: tuple[Answer, ...]

    def verdicts(self) -> tuple[str, ...]:
        """What the page's filter knows it as: right, wrong, failed; gained, lost (first answer against last)."""
        first, last = self.answers[0], self.answers[-1]
        found = ["failed" if last.error else "right" if last.ok else "wrong"]
        if len(self.answers) > 1 and first.ok != last.ok:
            found.append("gained" if last.ok else "lost")
        return tuple(found)


class RunReport(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="run_report/1"):
    """A run's page."""

    title: str
    subtitle: str = ""
    facts: dict[str, str] = {}  # recipe, run, seed, machine …
    notes: tuple[str, ...] = ()  # what a reader must know before believing the numbers
    stages: tuple[Stage, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    curves: tuple[Curve, ...] = ()
    other_curves: tuple[Curve, ...] = ()  # folded away
    tasks: tuple[ShownTask, ...] = ()
    num_tasks: int = 0  # of which `tasks` are shown
    lineage: Lineage | None = None
    served_as: str = ""  # where the lineage's model is champion: the project
    promotions: tuple[Promotion, ...] = ()
    created_s: float = 0.0


def build_run_report(
    run: RunFolder,
    *,
    title: str,
    subtitle: str = "",
    stages: Sequence[Stage] = (),
    comparisons: Sequence[Comparison] = (),
    charts: Mapping[str, Sequence[str]] | None = None,
    facts: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    registry: Registry | None = None,
    model: str | None = None,
    project: str | None = None,
) -> RunReport:
    """Gather a run's page from its folder and the registry.

    Args:
        stages: models on the way with their reports, first to last; their answers are shown side by side.
        comparisons: of stages; they are shown under the stages' names.
        charts: title → metric names; by default every known metric of `metrics.jsonl`, the others folded away.
        registry: for lineage, promotions and champions.
        model: the artifact whose lineage is drawn (id, prefix or name).
        project: whose promotions are listed.
    """
    state = run.state
    where = run.path / "metrics.jsonl"
    rows = read_metrics(where) if where.exists() else []
    known, rest = _charts(rows) if charts is None else (charts, {})
    all_facts = {
        "run": run.id,
        "recipe": state.recipe,
        "settings": state.fingerprint,
        "took": _duration(state.seconds()),
    }
    tasks = shown_tasks([(stage.name, stage.report) for stage in stages])
    promotions = registry.history(project) if registry is not None and project else []
    lineage = registry.lineage(model) if registry is not None and model else None
    champion = registry.champion(project) if registry is not None and project else None
    return RunReport(
        title=title,
        subtitle=subtitle,
        facts={**all_facts, **_code(state.code), **(facts or {})},
        notes=(*notes, *_warnings(stages)),
        stages=tuple(stages),
        comparisons=tuple(_named(comparison, stages) for comparison in comparisons),
        curves=curves_from_metrics(rows, known),
        other_curves=curves_from_metrics(rows, rest),
        tasks=tasks,
        num_tasks=max((len({s.task.id for s in stage.report.samples}) for stage in stages), default=0),
        lineage=lineage,
        served_as=project if project and champion and lineage and champion.id == lineage.root().id else "",
        promotions=tuple(promotions),
        created_s=time.time(),
    )


def shown_tasks(reports: Sequence[tuple[str, EvalReport]], limit: int = MAX_TASKS) -> tuple[ShownTask, ...]:
    """Tasks with each model's first answer, by task id.

    Where there are more than `limit`, wrong and right ones of the last model are both kept, half and half if need be.
    """
    answers: dict[str, dict[str, EvalSample]] = {}
    for label, report in reports:
        for sample in report.samples:
            answers.setdefault(sample.task.id, {}).setdefault(label, sample)
    if not reports:
        return ()
    last = reports[-1][0]
    wrong = [task_id for task_id, own in answers.items() if not (last in own and is_right(own[last]))]
    right = [task_id for task_id in answers if task_id not in set(wrong)]
    share = min(len(wrong), max(limit // 2, limit - len(right)))
    chosen = {*wrong[:share], *right[: limit - share]}
    return tuple(_shown(own) for task_id, own in answers.items() if task_id in chosen)


def _shown(own: Mapping[str, EvalSample]) -> ShownTask:
    task = next(iter(own.values())).task
    return ShownTask(
        id=task.id,
        prompt=task.prompt_text(),
        gold=task.answer,
        tags=task.tags,
        answers=tuple(
            Answer(
                label=label,
                text=sample.text,
                ok=is_right(sample),
                score=sample.grade.score,
                parts=sample.grade.parts,
                rationale=sample.grade.rationale,
                error=sample.grade.error,
                stop_reason=sample.stop_reason.value,
                num_tokens=sample.num_tokens,
            )
            for label, sample in own.items()
        ),
    )


def _charts(rows: Sequence[Mapping[str, float]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Known metrics with their titles, stage by stage, and the others each under its own name."""
    names = list(dict.fromkeys(name for row in rows for name in row if name != "step"))
    of_metric = {metric: title for title, metrics in KNOWN_CHARTS.items() for metric in metrics}
    found: dict[str, dict[str, list[str]]] = {}  # stage → title → names
    for name in names:
        prefix, _, rest = name.partition("/")
        if name in of_metric:
            found.setdefault("", {}).setdefault(of_metric[name], []).append(name)
        elif rest in of_metric:
            found.setdefault(prefix, {}).setdefault(of_metric[rest], []).append(name)
    known = {
        f"{stage} · {title}" if stage else title: titles[title]
        for stage, titles in found.items()
        for title in KNOWN_CHARTS
        if title in titles
    }
    used = {name for taken in known.values() for name in taken}
    return known, {name: [name] for name in names if name not in used}


def _named(comparison: Comparison, stages: Sequence[Stage]) -> Comparison:
    """The stages' names in place of the models' ids."""
    names = {stage.report.model: stage.name for stage in stages}
    return comparison.replace(
        candidate=names.get(comparison.candidate, comparison.candidate),
        champion=names.get(comparison.champion, comparison.champion),
    )


def _warnings(stages: Sequence[Stage]) -> list[str]:
    return [
        f"{stage.name}: {stage.report.num_failed} of {len(stage.report.samples)} answers could not be graded; "
        "they count as wrong"
        for stage in stages
        if stage.report.num_failed
    ]


def _code(code: Mapping[str, Any]) -> dict[str, str]:
    commit, _, dirty = str(code.get("commit", "")).partition("-")
    shown = f"{code.get('posttrain', '?')}" + (f" @ {commit[:10]}" if commit else "") + (f"-{dirty}" if dirty else "")
    return {"posttrain": shown}


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
