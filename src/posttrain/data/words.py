"""Texts as normalised words and hashed word n-grams, the same on every machine."""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Hashes: TypeAlias = npt.NDArray[np.uint64]

# A word is a run of letters and digits; Chinese and Japanese, written without spaces, count by character.
CHARACTERS = "㐀-䶿一-鿿豈-﫿぀-ヿ"
WORD = re.compile(rf"[{CHARACTERS}]|[^\W{CHARACTERS}_]+")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplication permutes the 64-bit numbers


def normalise(text: str) -> str:
    """The text in NFKC, case folded, with every run of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(text: str) -> list[str]:
    """The normalised text's words, without punctuation."""
    return WORD.findall(normalise(text))


def text_key(text: str) -> str:
    """A hash that is the same for texts that differ only in case, width of characters and white space."""
    return hashlib.sha256(normalise(text).encode("utf-8", "surrogatepass")).hexdigest()


@functools.lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def ngram_hashes(tokens: Sequence[str], n: int) -> Hashes:
    """64-bit hashes of all runs of n words, in order; none where there are fewer than n words.

    Two different n-grams share a hash with a probability of about 2**-64.
    """
    count = len(tokens) - n + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    hashes = np.fromiter(map(_word_hash, tokens), dtype=np.uint64, count=len(tokens))
    total = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        total = total * MULTIPLIER + hashes[offset : offset + count]
    return total
