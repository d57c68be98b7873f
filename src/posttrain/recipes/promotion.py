"""A recipe's stages before the gate: the candidate against the champion, on the same questions."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.core import GateRefused
from posttrain.evaluate import Stage, compare
from posttrain.recipes.workbench import Workbench
from posttrain.registry import Gate

GATE = Gate(min_samples=200, require_contamination_check=True)


def promote(bench: Workbench, project: str, candidate: Stage, others: Sequence[Stage], reason: str) -> bool:
    """Offer a stage's model to the gate, compared with the champion on the same questions."""
    card = bench.registry.card(candidate.report.model)
    champion = bench.registry.champion(project)
    for past in bench.registry.history(project):
        if past.card.id == card.id and past.reason == reason:
            bench.say(f"decided before: {card.name}, {reason}")  # this run was interrupted after it
            return not past.refused_for
    found = None
    if champion is not None and champion.id != card.id:
        theirs = [stage.report for stage in others if stage.report.model == champion.id]
        found = compare(candidate.report, (theirs or bench.registry.reports(champion.id, candidate.report.suite))[0])
    try:
        bench.registry.promote(project, card, comparison=found, gate=GATE, reason=reason)
    except GateRefused as error:
        bench.say(f"refused: {error}")
        return False
    bench.say(f"promoted: {card.name} is the champion of {project}")
    return True


def is_champion(bench: Workbench, project: str, stage: Stage) -> bool:
    """True where the stage's model is what the project serves, or was when its present champion was made of it."""
    champion = bench.registry.champion(project)
    return champion is not None and stage.report.model in (champion.id, *champion.parents)
