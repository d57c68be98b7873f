"""From many signals to one verdict per answer: the latest of each source counts, then the majority of sources.

An answer is named by its key, (completion id, choice). A source is whoever gave the signal (`Feedback.source`); give
each person their own, or later signals of one replace earlier ones of another.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

import msgspec

from posttrain.core import Feedback
from posttrain.feedback.store import TIES

Key = tuple[str, int]  # completion id, choice
T = TypeVar("T", bound=Hashable)


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """How signals are read as good or bad."""

    good_rating: float = 4.0  # a rating of this or more is a vote for the answer
    bad_rating: float = 2.0  # a rating of this or less is a vote against; between the two it is no vote
    outcome: str | None = None  # name of a boolean label that also counts as a vote


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the sources together say of one answer."""

    good: bool | None  # the majority; None: no votes, or a tie
    rating: float | None  # mean of the sources' ratings
    correction: str | None  # the corrected text that most sources gave; of equals, the latest
    disputed: tuple[str, ...]  # what sources disagree about: "vote", "correction"
    vote_ids: tuple[str, ...]  # feedback ids behind `good` and `rating`
    correction_ids: tuple[str, ...]  # feedback ids that gave `correction`


class Preference(msgspec.Struct, frozen=True, kw_only=True):
    """What the sources together say of a pair."""

    result: tuple[Key, Key] | None  # chosen, rejected; None: a tie between sources
    disputed: bool
    feedback_ids: tuple[str, ...]


def key_of(feedback: Feedback) -> Key:
    """The answer that a signal speaks of."""
    return (feedback.completion_id, feedback.choice)


def rejected_key_of(feedback: Feedback) -> Key | None:
    """The answer that lost, where the signal is a comparison."""
    return None if feedback.rejected_id is None else (feedback.rejected_id, feedback.rejected_choice)


def latest(signals: Iterable[Feedback]) -> list[Feedback]:
    """The last signal of each (source, kind, name) on each answer or pair, by time, then order of arrival."""
    ordered = sorted(enumerate(signals), key=lambda pair: (pair[1].created_s, pair[0]))
    kept: dict[Hashable, Feedback] = {}
    for _, signal in ordered:
        rejected = rejected_key_of(signal)
        about: Hashable = key_of(signal) if rejected is None else frozenset((key_of(signal), rejected))
        identity = (about, signal.source, signal.kind, signal.name)
        kept.pop(identity, None)  # so that the dict's order stays that of time
        kept[identity] = signal
    return list(kept.values())


def verdict(key: Key, signals: Iterable[Feedback], rules: Rules) -> Verdict:
    """The sources' verdict on one answer.

    Args:
        key: the answer.
        signals: signals that may speak of it, others are passed over.
        rules: what counts as good and bad.
    """
    votes: dict[str, tuple[bool, str]] = {}  # source → its latest vote, feedback id
    ratings: dict[str, tuple[float, str]] = {}
    corrections: dict[str, tuple[str, str]] = {}
    for signal in latest(signals):
        if key not in (key_of(signal), rejected_key_of(signal)):
            continue
        vote = _vote(signal, rules)
        if vote is not None:
            votes.pop(signal.source, None)
            votes[signal.source] = (vote, signal.id)
        if signal.kind == "rating" and isinstance(signal.value, int | float):
            ratings[signal.source] = (float(signal.value), signal.id)
        if signal.kind == "correction" and isinstance(signal.value, str):
            corrections.pop(signal.source, None)
            corrections[signal.source] = (signal.value, signal.id)
    good, vote_disputed = _majority([vote for vote, _ in votes.values()])
    text, text_disputed = _most_common([value for value, _ in corrections.values()])
    disputed = [name for name, is_so in (("vote", vote_disputed), ("correction", text_disputed)) if is_so]
    ids = [identifier for _, identifier in votes.values()] + [identifier for _, identifier in ratings.values()]
    return Verdict(
        good=good,
        rating=sum(value for value, _ in ratings.values()) / len(ratings) if ratings else None,
        correction=text,
        disputed=tuple(disputed),
        vote_ids=tuple(sorted(set(ids))),
        correction_ids=tuple(sorted(identifier for value, identifier in corrections.values() if value == text)),
    )


def preferences(signals: Iterable[Feedback]) -> Mapping[frozenset[Key], Preference]:
    """The sources' verdict on each pair that was compared.

    Args:
        signals: signals of kind `preferred`; ties between the answers (`tie_good`, `tie_bad`) make no pair.
    """
    by_pair: dict[frozenset[Key], list[Feedback]] = defaultdict(list)
    for signal in latest(signals):
        rejected = rejected_key_of(signal)
        if rejected is not None and signal.value is None:
            by_pair[frozenset((key_of(signal), rejected))].append(signal)
    result = {}
    for pair, votes in by_pair.items():
        winners = Counter(key_of(vote) for vote in votes)
        (winner, most), *others = winners.most_common()
        tied = bool(others) and others[0][1] == most
        (loser,) = pair - {winner}
        result[pair] = Preference(
            result=None if tied else (winner, loser),
            disputed=bool(others),
            feedback_ids=tuple(sorted(vote.id for vote in votes if tied or key_of(vote) == winner)),
        )
    return result


def _vote(signal: Feedback, rules: Rules) -> bool | None:
    if signal.kind == "thumb" and isinstance(signal.value, bool):
        return signal.value
    if signal.kind == "rating" and isinstance(signal.value, int | float):
        if signal.value >= rules.good_rating:
            return True
        return False if signal.value <= rules.bad_rating else None
    if signal.kind == "label" and signal.name == rules.outcome and isinstance(signal.value, bool):
        return signal.value
    if signal.kind == "preferred" and signal.value in TIES:
        return signal.value == "tie_good"
    return None


def _majority(votes: list[bool]) -> tuple[bool | None, bool]:
    up = sum(votes)
    down = len(votes) - up
    return (None if up == down else up > down), bool(up and down)


def _most_common(values: list[T]) -> tuple[T | None, bool]:
    """The most frequent value, of equals the last one; and whether there were several."""
    if not values:
        return None, False
    counts = Counter(values)
    most = max(counts.values())
    return next(value for value in reversed(values) if counts[value] == most), len(counts) > 1
