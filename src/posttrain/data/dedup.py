"""Duplicates: equal texts, and nearly equal ones by MinHash and locality-sensitive hashing.

MinHash: Broder, "On the resemblance and containment of documents", 1997. Candidates that the hashing proposes are
confirmed with their true Jaccard similarity, so that nothing is dropped on an estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import msgspec
import numpy as np

from posttrain.core import Record, UsageError, derive_seed
from posttrain.data.texts import Item, identified, whole_text
from posttrain.data.words import Hashes, ngram_hashes, text_key, words

T = TypeVar("T", bound=Item)

RECALL = 0.99  # probability with which a pair at the threshold must become a candidate
CHUNK = 4096  # shingles hashed at once; bounds memory for long documents


class Duplicate(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An item that was left out, and the one that was kept in its stead."""

    id: str
    kept_id: str
    similarity: float  # Jaccard similarity of the shingles; 1.0 for equal texts


class Deduplicated(msgspec.Struct, Generic[T], frozen=True):
    """What is left, in the order given, and what was left out."""

    kept: list[T]
    duplicates: list[Duplicate]


def dedup_exact(items: Iterable[T], *, text: Callable[[T], str] = whole_text) -> Deduplicated[T]:
    """Keep the first of the items whose texts are equal but for case, width of characters and white space.

    Args:
        items: texts, (id, text) pairs, tasks or rows.
        text: what is compared; by default prompt and answers together.
    """
    first: dict[str, str] = {}
    kept: list[T] = []
    duplicates: list[Duplicate] = []
    for item_id, item in _named(items):
        kept_id = first.setdefault(text_key(text(item)), item_id)
        if kept_id is item_id:
            kept.append(item)
        else:
            duplicates.append(Duplicate(id=item_id, kept_id=kept_id, similarity=1.0))
    return Deduplicated(kept=kept, duplicates=duplicates)


def dedup_near(
    items: Iterable[T],
    *,
    threshold: float = 0.8,
    ngram: int = 3,
    num_hashes: int = 128,
    seed: int = 0,
    text: Callable[[T], str] = whole_text,
) -> Deduplicated[T]:
    """Keep the first of the items that resemble one another.

    An item is left out if its Jaccard similarity (shared shingles / all shingles of both) with an item kept before is
    at least the threshold. A pair at the threshold is found with a probability of 99 %, a more similar one more surely.

    Args:
        items: texts, (id, text) pairs, tasks or rows.
        threshold: similarity in (0, 1].
        ngram: words of a shingle; a text with fewer words is one shingle.
        num_hashes: length of the signature.
        seed: of the hash functions.
        text: what is compared; by default prompt and answers together.
    """
    if not 0 < threshold <= 1 or ngram < 1 or num_hashes < 1:
        raise UsageError(
            f"threshold {threshold} must be in (0, 1], ngram {ngram} and num_hashes {num_hashes} 1 or more"
        )
    minhash = MinHash(num_hashes, seed)
    rows = band_rows(threshold, num_hashes)
    buckets: dict[tuple[int, bytes], list[int]] = {}
    kept: list[T] = []
    kept_ids: list[str] = []
    shingled: list[Hashes] = []
    duplicates: list[Duplicate] = []
    for item_id, item in _named(items):
        shingles = shingle(text(item), ngram)
        signature = minhash.signature(shingles)
        keys = [(at, signature[at : at + rows].tobytes()) for at in range(0, num_hashes - rows + 1, rows)]
        near = sorted({index for key in keys for index in buckets.get(key, ())})
        similar = ((index, jaccard(shingles, shingled[index])) for index in near)
        best = max((pair for pair in similar if pair[1] >= threshold), key=lambda pair: pair[1], default=None)
        if best is not None:
            duplicates.append(Duplicate(id=item_id, kept_id=kept_ids[best[0]], similarity=best[1]))
            continue
        for key in keys:
            buckets.setdefault(key, []).append(len(kept))
        kept.append(item)
        kept_ids.append(item_id)
        shingled.append(shingles)
    return Deduplicated(kept=kept, duplicates=duplicates)


def _named(items: Iterable[T]) -> Iterable[tuple[str, T]]:
    return identified(items)  # type: ignore[return-value]  # gives back the very items it is given


def shingle(text: str, ngram: int) -> Hashes:
    """The distinct hashed n-grams of a text, sorted; the whole text is one where it has fewer than n words."""
    tokens = words(text)
    return np.unique(ngram_hashes(tokens, min(ngram, max(1, len(tokens)))))


def jaccard(first: Hashes, second: Hashes) -> float:
    """Shared elements / all elements of two sets, given as sorted arrays; two empty sets are equal."""
    if not len(first) and not len(second):
        return 1.0
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


class MinHash:
    """Signatures whose share of equal places estimates the Jaccard similarity of two sets.

    K hash functions, S elements.
    """

    def __init__(self, num_hashes: int, seed: int) -> None:
        draws = [derive_seed(seed, "minhash", index) for index in range(2 * num_hashes)]
        self.factors_K = np.array(draws[:num_hashes], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self.offsets_K = np.array(draws[num_hashes:], dtype=np.uint64)

    def signature(self, elements_S: Hashes) -> Hashes:
        """The least value of each hash function over the set; the largest number for the empty set."""
        least_K: Hashes = np.full(len(self.factors_K), np.iinfo(np.uint64).max, dtype=np.uint64)
        for start in range(0, len(elements_S), CHUNK):
            part = elements_S[start : start + CHUNK]
            values_SK = part[:, None] * self.factors_K[None, :] + self.offsets_K[None, :]
            least_K = np.minimum(least_K, values_SK.min(axis=0))
        return least_K


def band_rows(threshold: float, num_hashes: int) -> int:
    """How many places of the signature must agree for a candidate: the most that finds pairs at the threshold surely.

    With r places to a band and b = num_hashes // r bands, a pair of similarity s is a candidate with 1 − (1 − s^r)^b.
    """
    fits = [r for r in range(1, num_hashes + 1) if 1 - (1 - threshold**r) ** (num_hashes // r) >= RECALL]
    return max(fits, default=1)
