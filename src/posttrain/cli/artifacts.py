"""`posttrain runs`, `show`, `promote`, `rollback`: what was made, from what, how good it is, and what is served."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.cli.printing import print_json, print_table, show_duration, show_time
from posttrain.core import Comparison, EvalReport, ModelCard, RegistryError, UsageError

if TYPE_CHECKING:
    from posttrain.registry import Gate, Registry


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands of this file."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs (default: runs)")
    runs = commands.add_parser("runs", parents=[shared], help="all runs, newest last")
    runs.add_argument("--limit", type=int, help="the newest so many")
    runs.add_argument("--json", action="store_true", help="print JSON")
    runs.set_defaults(action=list_all)
    show = commands.add_parser("show", parents=[shared], help="one run, model or other artifact, with its lineage")
    show.add_argument("id", help="id or a unique part of it; of artifacts also the name")
    show.add_argument("--json", action="store_true", help="print JSON")
    show.set_defaults(action=show_one)
    _add_promote(commands, shared)
    rollback_parser = commands.add_parser("rollback", parents=[shared], help="bring back the champion before this one")
    rollback_parser.add_argument("--project", required=True, help="whose champion")
    rollback_parser.add_argument("--to", metavar="ID", help="an earlier champion: id, prefix or name")
    rollback_parser.add_argument("--reason", default="", help="why; stays in the history")
    rollback_parser.set_defaults(action=rollback)


def _add_promote(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], shared: argparse.ArgumentParser
) -> None:
    parser = commands.add_parser(
        "promote",
        parents=[shared],
        help="make a model the champion of a project, if the gate lets it",
        description="Compare the newest reports of a model and of the project's champion on the same tasks, and "
        "promote the model if the gate lets it. Exit code 3: the gate refused, the champion stays.",
    )
    parser.add_argument("model", help="id, unique prefix or name of a model in the registry")
    parser.add_argument("--project", required=True, help="whose champion it becomes")
    parser.add_argument("--suite", help="compare on this suite (default: the newest that both were evaluated on)")
    parser.add_argument("--min-difference", type=float, help="the difference's lower bound must be above this")
    parser.add_argument("--confidence", type=float, help="of the interval and the test (default: 0.95)")
    parser.add_argument("--max-p-value", type=float, help="of McNemar's test (default: 0.05)")
    parser.add_argument("--min-samples", type=int, help="tasks that the evaluation must have (default: 30)")
    parser.add_argument("--max-failed", type=float, help="share of answers that could not be graded (default: 0.05)")
    parser.add_argument(
        "--require-contamination-check", action="store_true", default=None, help="refuse data that was never checked"
    )
    parser.add_argument("--force", action="store_true", help="overrule the gate; needs --reason")
    parser.add_argument("--reason", default="", help="why; stays in the history")
    parser.set_defaults(action=promote)


def open_registry(runs: Path) -> Registry:
    """The registry of a folder of runs; asking does not make one.

    Raises:
        RegistryError: there is none.
    """
    from posttrain.registry import Registry

    path = runs / "registry.db"
    if not path.is_file():
        raise RegistryError(f"{path}: no registry here; runs of recipes make one, --runs names another folder")
    return Registry(path)


def list_all(chosen: argparse.Namespace) -> int:
    """`posttrain runs`: from the folders alone, so that a damaged registry or run hides nothing."""
    from posttrain.cli.run_summary import summaries

    found = summaries(chosen.runs)
    if chosen.limit is not None:
        found = found[-chosen.limit :] if chosen.limit > 0 else []
    if chosen.json:
        print_json(found)
        return 0
    if not found:
        print(f"no runs in {chosen.runs}")
        return 0
    rows = [
        (
            run.id,
            run.recipe,
            run.status,
            "" if run.started is None else show_time(run.started),
            "" if run.seconds is None else show_duration(run.seconds),
            _number(run.reward),
            _number(run.loss),
            _number(run.accuracy),
        )
        for run in found
    ]
    print_table(("run", "recipe", "status", "started", "took", "reward", "loss", "accuracy"), rows)
    for run in found:
        if run.damage:
            print(f"{run.id}: {run.damage}")
    return 0


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def show_one(chosen: argparse.Namespace) -> int:
    """`posttrain show`."""
    from posttrain.cli.show import show_any

    show_any(chosen.id, chosen.runs, as_json=chosen.json)
    return 0


def promote(chosen: argparse.Namespace) -> int:
    """`posttrain promote`. GateRefused, with the gate's reasons, becomes exit code 3."""
    if chosen.force and not chosen.reason:
        raise UsageError("--force overrules the gate and stays in the history: say why with --reason TEXT")
    gate = _gate(chosen)
    with open_registry(chosen.runs) as registry:
        card = registry.card(chosen.model)
        champion = registry.champion(chosen.project)
        if champion is not None and champion.id == card.id:
            print(f"{card.name} ({card.id[:12]}) is the champion of {chosen.project} already")
            return 0
        comparison = None
        if champion is not None:
            comparison = _compare(registry, card, champion, chosen, gate)
        elif chosen.suite is not None and not registry.reports(card.id, chosen.suite):
            raise RegistryError(_no_reports(registry, card, chosen.suite))
        if comparison is not None:
            print(_describe(comparison))
        decision = registry.promote(
            chosen.project, card, comparison=comparison, gate=gate, force=chosen.force, reason=chosen.reason
        )
    if decision.forced:
        print(f"the gate's reasons against it were overruled: {'; '.join(decision.refused_for)}")
    print(f"promoted: {card.name} ({card.id[:12]}) is the champion of {chosen.project}")
    return 0


def _gate(chosen: argparse.Namespace) -> Gate:
    from posttrain.registry import Gate

    names = ("min_difference", "confidence", "max_p_value", "min_samples", "max_failed", "require_contamination_check")
    given = {name: getattr(chosen, name) for name in names if getattr(chosen, name) is not None}
    return Gate.from_dict(given, where="gate")


def _compare(
    registry: Registry, card: ModelCard, champion: ModelCard, chosen: argparse.Namespace, gate: Gate
) -> Comparison | None:
    """Candidate against champion on the newest reports of the same tasks; None leaves the refusal to the gate."""
    from posttrain.evaluate import compare

    pair = newest_pair(registry.reports(card.id, chosen.suite), registry.reports(champion.id, chosen.suite))
    if pair is None:
        if chosen.force:
            return None
        mine, its = (_suites(registry, model, chosen.suite) for model in (card, champion))
        raise RegistryError(
            f"{card.name} ({card.id[:12]}) and the champion {champion.name} ({champion.id[:12]}) have no reports on "
            f"the same tasks{f' of suite {chosen.suite!r}' if chosen.suite else ''}: it was evaluated on {mine}, "
            f"the champion on {its}. Evaluate both alike: posttrain evaluate --model FOLDER --data FILE --grader …"
        )
    return compare(*pair, margin=gate.min_difference, confidence=gate.confidence)


def newest_pair(mine: list[EvalReport], theirs: list[EvalReport]) -> tuple[EvalReport, EvalReport] | None:
    """The candidate's newest report for which the champion has one on the same tasks, and the newest such.

    Args:
        mine: the candidate's, newest first.
        theirs: the champion's, newest first.
    """
    for report in mine:
        for other in theirs:
            if other.suite_hash == report.suite_hash:
                return report, other
    return None


def _suites(registry: Registry, card: ModelCard, suite: str | None) -> str:
    reports = registry.reports(card.id, suite)
    return ", ".join(dict.fromkeys(f"{report.suite} ({report.suite_hash[:8]})" for report in reports)) or "nothing"


def _no_reports(registry: Registry, card: ModelCard, suite: str) -> str:
    return (
        f"{card.name} ({card.id[:12]}) has no report on suite {suite!r}; it was evaluated on "
        f"{_suites(registry, card, None)}. Evaluate it: posttrain evaluate --model {card.path} --data FILE --grader …"
    )


def _describe(found: Comparison) -> str:
    gap = found.difference
    return (
        f"{found.suite}: difference {gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}] on {gap.n} tasks, "
        f"wins {found.wins}, losses {found.losses}, ties {found.ties}, McNemar's p = {found.p_value:.4g}"
    )


def rollback(chosen: argparse.Namespace) -> int:
    """`posttrain rollback`."""
    with open_registry(chosen.runs) as registry:
        before = registry.champion(chosen.project)
        decision = registry.rollback(chosen.project, to=chosen.to, reason=chosen.reason)
    was = f" in place of {before.name} ({before.id[:12]})" if before else ""
    print(f"rolled back: {decision.card.name} ({decision.card.id[:12]}) is the champion of {chosen.project}{was}")
    return 0
