"""Champions: which model a project serves, how it came to be so, and the way back.

Per project one row names the promotion that made the champion, and the history only grows. Both change in one
transaction, so whatever kills the process, a project that had a champion has exactly one.
"""

from __future__ import annotations

import getpass
import math
import time
from pathlib import Path

from posttrain.core import Comparison, GateRefused, ModelCard, RegistryError
from posttrain.registry.database import Database, Row
from posttrain.registry.near import unknown
from posttrain.registry.promotion import Evidence, Gate, Promotion


class Champions:
    """The board of champions in a registry's database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def champion(self, project: str) -> ModelCard | None:
        """The present champion's card."""
        row = self._database.champion(project)
        return None if row is None else _promotion(row).card

    def history(self, project: str) -> list[Promotion]:
        """Every promotion, refusal and roll-back, oldest first."""
        return [_promotion(row) for row in self._database.promotions(project)]

    def promote(
        self,
        project: str,
        card: ModelCard,
        *,
        comparison: Comparison | None,
        evidence: Evidence,
        gate: Gate,
        force: bool,
        actor: str | None,
        reason: str,
    ) -> Promotion:
        """See `Registry.promote`."""
        if force and not reason:
            raise RegistryError("a forced promotion needs a reason: it stays in the history")
        _check_weights(card)
        seen = self._database.champion(project)
        if seen is not None and seen["card"] == card.id:
            return _promotion(seen)
        champion = None if seen is None else _promotion(seen).card
        _check_subjects(comparison, card, champion)
        refused_for = gate.reasons(first=champion is None, comparison=comparison, evidence=evidence)
        decision = Promotion(
            project=project,
            action="refused" if refused_for and not force else "promoted",
            card=card,
            previous=champion.id if champion else None,
            comparison=comparison,
            gate=gate,
            refused_for=tuple(refused_for),
            forced=force and bool(refused_for),
            actor=actor or _login(),
            reason=reason,
            created_s=time.time(),
        )
        written = self._decide(decision, seen, base=None if seen is None else seen["seq"])
        if written.action == "refused":
            why = "; ".join(written.refused_for)
            raise GateRefused(f"{card.name} ({card.id[:12]}) was not promoted in {project!r}: {why}")
        return written

    def rollback(self, project: str, *, to: str | None, actor: str | None, reason: str) -> Promotion:
        """See `Registry.rollback`."""
        seen = self._database.champion(project)
        if seen is None:
            raise RegistryError(unknown("project with a champion", project, self._database.projects()))
        target = self._earlier(project, seen, to)
        card = _promotion(target).card
        _check_weights(card)
        decision = Promotion(
            project=project,
            action="rolled_back",
            card=card,
            previous=seen["card"],
            actor=actor or _login(),
            reason=reason,
            created_s=time.time(),
        )
        return self._decide(decision, seen, base=target["base"])

    def _decide(self, decision: Promotion, seen: Row | None, base: int | None) -> Promotion:
        """Write the decision and, unless it is a refusal, the champion.

        The decision was made about the champion `seen`; if that is no longer the champion, it is void.
        `base` is the promotion that a roll-back of this one returns to.
        """
        crowned = decision.action != "refused"
        with self._database.transaction():
            now = self._database.champion(decision.project)
            if crowned and (now and now["seq"]) != (seen and seen["seq"]):
                raise RegistryError(
                    f"project {decision.project!r}: another promotion came first (the champion is now "
                    f"{_promotion(now).card.name if now else 'none'}). Compare with the new champion and try again"
                )
            seq = self._database.put_promotion(
                {
                    "project": decision.project,
                    "action": decision.action,
                    "card": decision.card.id,
                    "base": base,
                    "record": decision.to_json().decode(),
                }
            )
            if crowned:
                self._database.set_champion(decision.project, seq)
        return decision.replace(seq=seq)

    def _earlier(self, project: str, seen: Row, to: str | None) -> Row:
        if to is None:
            target = None if seen["base"] is None else self._database.promotion(seen["base"])
            if target is None:
                raise RegistryError(f"project {project!r}: there is no champion before this one")
            return target
        reigns = [row for row in self._database.promotions(project) if row["action"] != "refused"]
        fits = [row for row in reigns if (to and row["card"].startswith(to)) or _promotion(row).card.name == to]
        if len({row["card"] for row in fits}) != 1:
            names = list(dict.fromkeys(f"{_promotion(row).card.name} ({row['card'][:12]})" for row in fits or reigns))
            raise RegistryError(unknown(f"former champion of {project!r}", to, names, several=bool(fits)))
        if fits[-1]["card"] == seen["card"]:
            raise RegistryError(f"project {project!r}: {to} is the champion already")
        return fits[-1]


def _check_weights(card: ModelCard) -> None:
    if not Path(card.path).exists():
        raise RegistryError(f"{card.name} ({card.id[:12]}): its weights are gone from {card.path}")


def _check_subjects(comparison: Comparison | None, card: ModelCard, champion: ModelCard | None) -> None:
    if comparison is None:
        return
    gap = comparison.difference
    if not all(math.isfinite(value) for value in (gap.value, gap.low, gap.high, comparison.p_value)):
        raise RegistryError("the comparison holds a number that is not finite, so it proves nothing: evaluate again")
    by_name = champion is None or champion.name != card.name  # a name that both bear tells nothing
    if not _is_about(comparison.candidate, card, by_name):
        raise RegistryError(f"the comparison's candidate is {comparison.candidate}, not {card.name} ({card.id[:12]})")
    if champion is None:
        raise RegistryError("there is no champion yet, so the comparison is with something else: promote without it")
    if not _is_about(comparison.champion, champion, by_name):
        raise RegistryError(
            f"the comparison is with {comparison.champion}, but the champion is {champion.name} ({champion.id[:12]}). "
            "Compare with the present champion and try again"
        )


def _is_about(model: str, card: ModelCard, by_name: bool) -> bool:
    if model in (card.id, card.path) or (by_name and model == card.name):
        return True
    return len(model) >= 12 and card.id.startswith(model)


def _promotion(row: Row) -> Promotion:
    return Promotion.from_json(row["record"], f"promotion {row['seq']}").replace(seq=row["seq"])


def _login() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"
