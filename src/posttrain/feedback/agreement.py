"""How far the sources of feedback agree: raw agreement, and Cohen's kappa, which takes away what chance would give."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from itertools import combinations

from posttrain.core import Feedback, Record
from posttrain.feedback.signals import key_of, latest, rejected_key_of
from posttrain.feedback.store import FeedbackStore


class Agreement(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Two sources that judged the same answers in the same way."""

    name: str  # "thumb", "rating", "preferred", or a label's name
    sources: tuple[str, str]
    n: int  # answers (or pairs) that both judged
    agreement: float  # share on which they say the same
    kappa: float | None  # None: both always say the same one thing, so chance explains everything


def agreement(store: FeedbackStore) -> list[Agreement]:
    """Agreement of every two sources on everything that both judged, by name, then sources.

    Values are compared as categories: ratings of 4 and 5 disagree. Corrections are free text and are left out.
    """
    said: dict[str, dict[Hashable, dict[str, Hashable]]] = defaultdict(lambda: defaultdict(dict))
    for signal in latest(store.all_feedback()):
        if signal.kind == "correction":
            continue
        name = signal.name if signal.kind == "label" else signal.kind
        about, value = _judgement(signal)
        said[name][about][signal.source] = value
    found = []
    for name, items in sorted(said.items()):
        sources = sorted({source for judgements in items.values() for source in judgements})
        for one, other in combinations(sources, 2):
            pairs = [(judged[one], judged[other]) for judged in items.values() if one in judged and other in judged]
            if pairs:
                same = sum(a == b for a, b in pairs) / len(pairs)
                kappa = cohen_kappa(pairs)
                found.append(Agreement(name=name, sources=(one, other), n=len(pairs), agreement=same, kappa=kappa))
    return found


def cohen_kappa(pairs: Sequence[tuple[Hashable, Hashable]]) -> float | None:
    """κ = (p_o − p_e) / (1 − p_e) of two raters (Cohen 1960).

    Args:
        pairs: what the first and the second rater said of each item; at least one.

    Returns:
        1 for full agreement, 0 for that of chance; None where p_e is 1.
    """
    n = len(pairs)
    observed = sum(a == b for a, b in pairs)  # n p_o
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    expected = sum(first[value] * second[value] for value in first)  # n² p_e
    if expected == n * n:
        return None
    return (observed * n - expected) / (n * n - expected)


def _judgement(signal: Feedback) -> tuple[Hashable, Hashable]:
    """What a signal is about, and what it says of it: of a comparison, which answer won, or the kind of tie."""
    rejected = rejected_key_of(signal)
    if rejected is None:
        return key_of(signal), signal.value
    return frozenset((key_of(signal), rejected)), signal.value or key_of(signal)
