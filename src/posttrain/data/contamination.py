"""Whether training data holds evaluation data.

The rule is Tülu 3's (arXiv 2411.15124, section 3.2): an evaluation instance matches a training document if more than
half of its words lie in 8-grams that occur in that one document. Besides, equal normalised texts always match, which is
all that can be said of texts shorter than an n-gram.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from posttrain.core import Record, UsageError
from posttrain.data.texts import Item, identified, prompt_text, whole_text
from posttrain.data.words import Hashes, ngram_hashes, text_key, words

Ints: TypeAlias = npt.NDArray[np.int64]
Side: TypeAlias = Literal["evaluation", "training"]


class ContaminationMatch(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One training document that holds one evaluation instance, or the other way round."""

    train_id: str
    evaluation_id: str
    evaluation_set: str
    kind: Literal["exact", "ngram"]
    coverage: float  # share of words covered, of the side that `ContaminationReport.of` names


class SetShare(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much of one evaluation set is in the training data."""

    num: int  # instances
    num_matched: int  # instances with at least one match
    num_short: int  # instances with fewer words than an n-gram: only an exact match would show

    @property
    def share(self) -> float:
        """Matched instances / instances. Tülu 3 acts on a training set that touches more than 2 %."""
        return self.num_matched / self.num if self.num else 0.0


class ContaminationReport(
    Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="contamination/1"
):
    """The outcome of a check, fit for the lineage of a run."""

    ngram: int
    threshold: float
    of: Side  # whose words coverage is a share of
    num_training: int
    matches: tuple[ContaminationMatch, ...]
    sets: dict[str, SetShare]
    dropped: tuple[str, ...]  # ids of training documents with a match, in their order
    clean: tuple[str, ...]  # ids of the others

    def summary(self) -> str:
        """One line for each evaluation set, and one for the training data."""
        lines = [
            f"{name}: {share.num_matched} of {share.num} instances ({100 * share.share:.1f} %) are in the training data"
            + (
                f"; {share.num_short} have fewer than {self.ngram} words, compared as a whole only"
                * (share.num_short > 0)
            )
            for name, share in self.sets.items()
        ]
        return "\n".join([*lines, f"{len(self.dropped)} of {self.num_training} training documents match"])


def check_contamination(
    training: Iterable[Item],
    evaluation: Iterable[Item] | Mapping[str, Iterable[Item]],
    *,
    ngram: int = 8,
    threshold: float = 0.5,
    of: Side = "evaluation",
) -> ContaminationReport:
    """Search training documents for evaluation instances.

    Memory grows with the evaluation data and the ids of the training data, not with its texts.

    Args:
        training: texts, (id, text) pairs, tasks or rows; of rows with answers, prompt and answers are one document.
        evaluation: the same, or several sets by name; of tasks and rows, the prompt alone is compared. System prompts
            are left out on both sides.
        ngram: words of an n-gram.
        threshold: the coverage above which a pair matches; equality is not enough.
        of: "evaluation": coverage is the share of the evaluation instance's words that one training document covers
            (does training give the question away?). "training": the share of the training document's words that one
            evaluation instance covers (is this document made of a question?).

    Raises:
        UsageError: a setting out of range, or an item without text.
    """
    if ngram < 1 or not 0 <= threshold <= 1 or of not in ("evaluation", "training"):
        raise UsageError(
            f"ngram {ngram} must be 1 or more, threshold {threshold} in [0, 1], of {of!r} one of the two sides"
        )
    sets = evaluation if isinstance(evaluation, Mapping) else {"evaluation": evaluation}
    index = _Index(sets, ngram)
    matches: list[ContaminationMatch] = []
    dropped: list[str] = []
    clean: list[str] = []
    for train_id, item in identified(training):
        found = index.search(whole_text(item), threshold, of)
        found.update(dict.fromkeys(index.exact.get(text_key(prompt_text(item)), ()), None))
        for instance, coverage in sorted(found.items()):
            matches.append(index.match(train_id, instance, coverage))
        (dropped if found else clean).append(train_id)
    return ContaminationReport(
        ngram=ngram,
        threshold=threshold,
        of=of,
        num_training=len(dropped) + len(clean),
        matches=tuple(matches),
        sets=index.shares(matches),
        dropped=tuple(dropped),
        clean=tuple(clean),
    )


class _Index:
    """The n-grams of all evaluation instances, sorted by hash. I instances, N n-grams."""

    def __init__(self, sets: Mapping[str, Iterable[Item]], ngram: int) -> None:
        self.ngram = ngram
        self.ids: list[tuple[str, str]] = []  # I, set and id
        self.exact: dict[str, list[int]] = {}
        lengths: list[int] = []
        hashes: list[Hashes] = []
        self.short: dict[str, int] = dict.fromkeys(sets, 0)
        for name, items in sets.items():
            for evaluation_id, item in identified(items):
                text = prompt_text(item)
                tokens = words(text)
                if text.strip():
                    self.exact.setdefault(text_key(text), []).append(len(self.ids))
                self.ids.append((name, evaluation_id))
                lengths.append(len(tokens))
                hashes.append(ngram_hashes(tokens, ngram))
                self.short[name] += len(tokens) < ngram
        counts = np.array([len(one) for one in hashes], dtype=np.int64)
        all_hashes = np.concatenate(hashes) if hashes else np.empty(0, dtype=np.uint64)
        order = np.argsort(all_hashes, kind="stable")
        self.lengths_I: Ints = np.array(lengths, dtype=np.int64)
        self.hashes_N: Hashes = all_hashes[order]
        self.instances_N: Ints = np.repeat(np.arange(len(hashes), dtype=np.int64), counts)[order]
        starts_I = np.cumsum(counts) - counts
        self.positions_N: Ints = (np.arange(len(all_hashes), dtype=np.int64) - np.repeat(starts_I, counts))[order]

    def search(self, text: str, threshold: float, of: Side) -> dict[int, float | None]:
        """Instances that match one document: their coverage, or None for equal texts."""
        found: dict[int, float | None] = {}
        tokens = words(text)
        grams = ngram_hashes(tokens, self.ngram)
        low = np.searchsorted(self.hashes_N, grams, side="left")
        counts = np.searchsorted(self.hashes_N, grams, side="right") - low
        if counts.any():
            total = int(counts.sum())
            within = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
            postings = np.repeat(low, counts) + within
            instances = self.instances_N[postings]
            at = self.positions_N[postings] if of == "evaluation" else np.repeat(np.arange(len(grams)), counts)
            which, covered = _num_covered(instances, at, self.ngram)
            sizes = self.lengths_I[which] if of == "evaluation" else np.full(len(which), len(tokens))
            coverage = covered / sizes
            hits = coverage > threshold
            found.update(zip(which[hits].tolist(), coverage[hits].tolist(), strict=True))
        found.update(dict.fromkeys(self.exact.get(text_key(text), ()), None))
        return found

    def match(self, train_id: str, instance: int, coverage: float | None) -> ContaminationMatch:
        name, evaluation_id = self.ids[instance]
        return ContaminationMatch(
            train_id=train_id,
            evaluation_id=evaluation_id,
            evaluation_set=name,
            kind="exact" if coverage is None else "ngram",
            coverage=1.0 if coverage is None else coverage,
        )

    def shares(self, matches: Iterable[ContaminationMatch]) -> dict[str, SetShare]:
        nums = dict.fromkeys(self.short, 0)
        for name, _ in self.ids:
            nums[name] += 1
        hit = {(match.evaluation_set, match.evaluation_id) for match in matches}
        return {
            name: SetShare(
                num=num, num_matched=sum(key in hit for key in self.ids if key[0] == name), num_short=self.short[name]
            )
            for name, num in nums.items()
        }


def _num_covered(instances: Ints, positions: Ints, ngram: int) -> tuple[Ints, Ints]:
    """For each instance, how many words the n-grams beginning at `positions` cover together.

    An n-gram covers n words, or as many as there are up to the beginning of the next one.
    """
    base = int(positions.max()) + 1
    instances, positions = np.divmod(np.unique(instances * base + positions), base)
    covered = np.full(len(instances), ngram, dtype=np.int64)
    same = instances[1:] == instances[:-1]
    covered[:-1][same] = np.minimum(positions[1:] - positions[:-1], ngram)[same]
    which, starts = np.unique(instances, return_index=True)
    return which, np.add.reduceat(covered, starts)
