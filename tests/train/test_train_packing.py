"""Packing: everything once, nothing split, rows full."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from posttrain.train import Denominators, pack
from posttrain.train.rows import to_rows


def test_best_fit_by_hand():
    # Longest first: 7 opens row 0, 5 row 1, 4 fits row 1 (1 left), 3 fits row 0 exactly, 2 opens row 2, 1 row 1.
    assert pack([3, 7, 5, 1, 4, 2], 10) == [[1, 0], [2, 4, 3], [5]]
    assert pack([], 10) == []
    assert pack([99, 5], 10) == [[0], [1]]  # too long for any row: goes alone


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(1, 120))
def test_everything_once_within_budget(sizes, budget):
    batches = pack(sizes, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(sizes)))
    for batch in batches:
        assert len(batch) == 1 or sum(sizes[index] for index in batch) <= budget
    assert batches == pack(sizes, budget)
    fitting = [batch for batch in batches if sum(sizes[index] for index in batch) <= budget]
    fill = [sum(sizes[index] for index in batch) for batch in fitting]
    assert sum(size * 2 <= budget for size in fill) <= 1  # two half-empty rows would have been one


def test_denominators_count_what_carries_targets(make_examples):
    examples = make_examples(6, num_sequences=2, group_size=3)
    first = examples[0]
    half = first.replace(
        sequences=(
            first.sequences[0],
            first.sequences[1].replace(mask=(False,) * len(first.sequences[1].tokens)),
        )
    )
    none = examples[5].replace(sequences=tuple(s.replace(mask=(False,) * len(s.tokens)) for s in examples[5].sequences))
    counts = Denominators.of(to_rows([half, *examples[1:5], none]))
    assert counts.tokens == half.num_targets() + sum(example.num_targets() for example in examples[1:5])
    assert (counts.sequences, counts.examples, counts.groups) == (1 + 4 * 2, 5, 2)
    lonely = Denominators.of(to_rows([example.replace(group="") for example in examples]))
    assert lonely.groups == 6
