"""`posttrain show ID`: a run with its settings and last numbers, or an artifact with its lineage and history."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.cli.artifacts import open_registry
from posttrain.cli.printing import print_json, print_table, show_duration, show_interval, show_time
from posttrain.cli.run_summary import last_metrics, summary_of
from posttrain.core import EvalReport, Interval, PosttrainError, RegistryError

if TYPE_CHECKING:
    from posttrain.registry import Artifact, Promotion, Registry, RunFolder

NUM_EVENTS = 10
LENGTHS = ("completions/mean_length", "completions/min_length", "completions/max_length")


def show_any(ref: str, runs: Path, *, as_json: bool) -> None:
    """Show a run or an artifact, whichever the reference names.

    Args:
        ref: folder of a run; id of a run or a unique part of it; id, unique prefix or name of an artifact.
        runs: folder of runs and of the registry.

    Raises:
        RegistryError: nothing fits, or several things do.
    """
    run = find_run(ref, runs)
    if run is not None:
        _show_run(run, runs, as_json)
        return
    try:
        with open_registry(runs) as registry:
            _show_artifact(registry, registry.artifact(ref), as_json)
    except RegistryError as error:
        raise RegistryError(f"no run in {runs} fits {ref!r}, and as an artifact: {error}") from error


def find_run(ref: str, runs: Path) -> RunFolder | None:
    """The run that a reference names, or None.

    Raises:
        RegistryError: it is a part of several ids.
    """
    from posttrain.registry import RunFolder, list_runs

    for path in (Path(ref), runs / ref):
        if (path / "run.json").is_file():
            return RunFolder(path, read_only=True)  # `open` would refuse a damaged one
    found = list_runs(runs)
    for fits in (
        [run for run in found if run.id.startswith(ref)],
        [run for run in found if ref in run.id],
    ):
        if len(fits) == 1:
            return fits[0]
        if fits:
            raise RegistryError(f"run {ref!r} is ambiguous: {', '.join(run.id for run in fits[:8])}")
    return None


def _show_run(run: RunFolder, runs: Path, as_json: bool) -> None:
    summary = summary_of(run)
    config, events = _or_damage(lambda: run.config), _or_damage(run.events)
    metrics = last_metrics(run.path / "metrics.jsonl")
    checkpoints = sorted(path.name for path in (run.path / "checkpoints").glob("*") if not path.name.startswith("."))
    made = _made_by(run, runs)
    error = "" if summary.damage else (run.state.error or "")
    if as_json:
        plain = {"run": summary, "path": run.path, "error": error, "config": config, "metrics": metrics}
        tail = events[-NUM_EVENTS:] if isinstance(events, list) else events
        print_json({**plain, "checkpoints": checkpoints, "artifacts": made, "events": tail})
        return
    took = "" if summary.seconds is None else f", {show_duration(summary.seconds)}"
    print(f"run {run.id}: recipe {summary.recipe}, {summary.status}{took}")
    started = "" if summary.started is None else f"started {show_time(summary.started)}, "
    print(f"{started}in {run.path}")
    for line in filter(None, (summary.damage, error)):
        print(f"error: {line}")
    if isinstance(config, dict):
        print_table(("option", "value"), list(config.items()), title="\nsettings")
    else:
        print(f"settings: {config}")
    if metrics:
        rows = [(name, f"{value:.6g}") for name, value in sorted(metrics.items())]
        print_table(("metric", "last"), rows, title="\nmetrics")
    print(f"\ncheckpoints: {', '.join(checkpoints) or 'none'}")
    for artifact in made:
        print(f"made: {artifact.kind} {artifact.name}  {artifact.short()}  {artifact.path}")
    if run.report.is_file():
        print(f"report: {run.report}")
    print("\nevents")
    for event in events[-NUM_EVENTS:] if isinstance(events, list) else []:
        print("  " + event.to_line().decode().rstrip())
    if not isinstance(events, list):
        print(f"  {events}")


def _or_damage(read: Any) -> Any:
    """What a file says, or in words why it cannot be read."""
    try:
        return read()
    except (PosttrainError, OSError) as error:
        return str(error)


def _made_by(run: RunFolder, runs: Path) -> list[Artifact]:
    try:
        with open_registry(runs) as registry:
            return [artifact for artifact in registry.artifacts() if artifact.run == run.id]
    except RegistryError:
        return []


def _show_artifact(registry: Registry, artifact: Artifact, as_json: bool) -> None:
    lineage = registry.lineage(artifact.id)
    metrics: dict[str, Interval] = {}
    reports: list[EvalReport] = []
    promotions: list[Promotion] = []
    if artifact.kind == "model":
        metrics = registry.card(artifact.id).metrics
        reports = registry.reports(artifact.id)
        history = [decision for project in registry.projects() for decision in registry.history(project)]
        promotions = [decision for decision in history if decision.card.id == artifact.id]
    elif artifact.kind == "report":
        metrics = registry.report(artifact.id).metrics
    champion_of = [name for name in registry.projects() if _champion_id(registry, name) == artifact.id]
    if as_json:
        plain = {"artifact": artifact, "champion_of": champion_of, "metrics": metrics, "lineage": lineage}
        print_json({**plain, "promotions": promotions, "reports": [_about(report) for report in reports]})
        return
    print(f"{artifact.kind} {artifact.name}  {artifact.id}")
    print(
        f"{artifact.path} ({artifact.storage}, {artifact.num_bytes / 2**20:.1f} MiB), {show_time(artifact.created_s)}"
    )
    if champion_of:
        print(f"champion of {', '.join(champion_of)}")
    for name, value in artifact.meta.items():
        print(f"{name}: {value}")
    if metrics:
        rows = [(name, _show_metric(name, score), score.n, score.method) for name, score in metrics.items()]
        print_table(("metric", "value", "n", "interval"), rows, title="\nnewest report")
    if reports:
        about = [_about(report) for report in reports]
        print_table(("suite", "tasks", "accuracy"), [tuple(row.values()) for row in about], title="\nreports")
    print(f"\nlineage\n{lineage.tree()}")
    if promotions:
        rows_of = [
            (show_time(each.created_s), each.project, _decided(each), each.actor, each.reason) for each in promotions
        ]
        print_table(("when", "project", "decision", "by", "reason"), rows_of, title="\npromotions")


def _champion_id(registry: Registry, project: str) -> str | None:
    card = registry.champion(project)
    return None if card is None else card.id


def _about(report: EvalReport) -> dict[str, str]:
    tasks = len({sample.task.id for sample in report.samples})
    accuracy = report.metrics.get("accuracy")
    shown = "" if accuracy is None else show_interval(accuracy)
    return {"suite": f"{report.suite} ({report.suite_hash[:8]})", "tasks": str(tasks), "accuracy": shown}


def _show_metric(name: str, score: Interval) -> str:
    return show_interval(score, percent=name not in LENGTHS and name != "score")


def _decided(decision: Promotion) -> str:
    if decision.action == "refused":
        return f"refused: {'; '.join(decision.refused_for)}"
    return f"{decision.action.replace('_', ' ')}{' (forced)' if decision.forced else ''}"
