from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from posttrain import data
from posttrain.core import UsageError
from posttrain.data.dedup import MinHash, band_rows, jaccard, shingle
from posttrain.data.texts import whole_text


def test_exact_keeps_the_first() -> None:
    found = data.dedup_exact(["One two", "three", "one  TWO", ("x", "ＯＮＥ two\n"), "one, two"])
    assert found.kept == ["One two", "three", "one, two"]
    assert [(one.id, one.kept_id) for one in found.duplicates] == [("2", "0"), ("x", "0")]


def test_exact_can_look_at_the_prompt_alone() -> None:
    rows = [data.CompletionRow(id=str(n), prompt="same", completion=str(n)) for n in range(3)]
    assert len(data.dedup_exact(rows).kept) == 3
    assert len(data.dedup_exact(rows, text=lambda row: str(row.prompt)).kept) == 1


def test_jaccard_by_hand() -> None:
    # shingles of 2 words: {ab, bc, cd} and {ab, bc, ce}: 2 shared of 4
    assert jaccard(shingle("a b c d", 2), shingle("A b, c e", 2)) == 0.5
    assert jaccard(shingle("a", 3), shingle("a", 3)) == 1.0
    assert jaccard(shingle("", 3), shingle("", 3)) == 1.0
    assert jaccard(shingle("", 3), shingle("a", 3)) == 0.0


def test_minhash_estimates_jaccard() -> None:
    minhash = MinHash(1024, seed=0)
    generator = np.random.default_rng(0)
    pool = generator.integers(0, 2**63, size=3000, dtype=np.uint64)
    for shared in (100, 500, 900):
        first = np.unique(pool[:1000])
        second = np.unique(pool[1000 - shared : 2000 - shared])
        true = jaccard(first, second)
        estimate = float((minhash.signature(first) == minhash.signature(second)).mean())
        deviation = (true * (1 - true) / 1024) ** 0.5
        assert abs(estimate - true) < 4 * deviation


def test_bands_find_pairs_at_the_threshold() -> None:
    for threshold in (0.5, 0.7, 0.8, 0.9):
        rows = band_rows(threshold, 128)
        assert 1 - (1 - threshold**rows) ** (128 // rows) >= 0.99
        assert 1 - (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) < 0.99
    assert band_rows(1.0, 128) == 128


def test_near_duplicates() -> None:
    random.seed(1)
    vocabulary = [f"w{index}" for index in range(500)]
    texts = [" ".join(random.choices(vocabulary, k=100)) for _ in range(200)]
    close = []
    for index, text in enumerate(texts[:100]):
        tokens = text.split()
        tokens[index % 90] = "changed"  # 3 of 98 shingles become others: similarity 95 / 101 = 0.94
        close.append(" ".join(tokens))
    far = []
    for text in texts[100:150]:
        tokens = text.split()
        for at in range(2, 100, 12):
            tokens[at] = "changed"  # 9 words, 26 or 27 shingles: similarity below 0.6
        far.append(" ".join(tokens))
    found = data.dedup_near([*texts, *close, *far], threshold=0.8)
    assert found.kept == [*texts, *far]
    assert [(one.id, one.kept_id) for one in found.duplicates] == [
        (str(200 + index), str(index)) for index in range(100)
    ]
    assert min(one.similarity for one in found.duplicates) == pytest.approx(95 / 101, abs=0.02)
    assert data.dedup_near([*texts, *close, *far], threshold=0.8) == found


def test_near_settings() -> None:
    assert data.dedup_near(["a", "A.", "b"]).kept == ["a", "b"]
    assert data.dedup_near([]).kept == []
    for options in ({"threshold": 0}, {"threshold": 1.1}, {"ngram": 0}, {"num_hashes": 0}):
        with pytest.raises(UsageError):
            data.dedup_near(["a"], **options)


def test_real_rows_against_all_pairs(shared: Callable[[str], Path]) -> None:
    rows = data.load(shared("sft/gpteacher_codegen.jsonl.gz"), limit=450)
    near = data.dedup_near(rows, threshold=0.7)
    shingles = [shingle(whole_text(row), 3) for row in rows]
    kept: list[int] = []
    for index, one in enumerate(shingles):
        if all(jaccard(one, shingles[other]) < 0.7 for other in kept):
            kept.append(index)
    assert [row.id for row in near.kept] == [rows[index].id for index in kept]
    assert 0 < len(near.duplicates) == 450 - len(kept)
