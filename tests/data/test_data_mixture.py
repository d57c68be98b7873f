from __future__ import annotations

import itertools
import json
import math
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import data
from posttrain.core import DataError, UsageError


class Reread:
    """A source that can only be read from the beginning, again and again."""

    def __init__(self, items: list[str]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[str]:
        return iter(self.items)


def named(name: str, count: int) -> list[str]:
    return [f"{name}{index}" for index in range(count)]


def build(sizes: list[tuple[int, bool, float]], seed: int, buffer_size: int) -> data.Mixture[str]:
    sources = [
        (Reread(named(chr(97 + at), size)) if streaming else named(chr(97 + at), size), weight)
        for at, (size, streaming, weight) in enumerate(sizes)
    ]
    return data.Mixture(sources, seed, buffer_size=buffer_size)


SIZES = st.lists(st.tuples(st.integers(1, 12), st.booleans(), st.floats(0.1, 10)), min_size=1, max_size=4)


@settings(max_examples=120, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 2**62), buffer_size=st.integers(1, 9), cut=st.integers(0, 60))
def test_resume_at_any_cut_gives_the_same_continuation(
    sizes: list[tuple[int, bool, float]], seed: int, buffer_size: int, cut: int
) -> None:
    whole = list(itertools.islice(build(sizes, seed, buffer_size), cut + 40))
    first = build(sizes, seed, buffer_size)
    assert list(itertools.islice(first, cut)) == whole[:cut]
    saved = json.loads(json.dumps(first.state()))
    assert [next(first) for _ in range(40)] == whole[cut:], "taking the state changes nothing"
    fresh = build(sizes, seed, buffer_size)
    fresh.restore(saved)
    assert fresh.state() == saved
    assert [next(fresh) for _ in range(40)] == whole[cut:]
    first.restore(saved)  # back, too
    assert [next(first) for _ in range(40)] == whole[cut:]


@settings(max_examples=100, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 2**62), buffer_size=st.integers(1, 9), steps=st.integers(1, 150))
def test_each_pass_gives_every_item_once(
    sizes: list[tuple[int, bool, float]], seed: int, buffer_size: int, steps: int
) -> None:
    mixture = build(sizes, seed, buffer_size)
    drawn: dict[str, list[str]] = {name: [] for name in mixture.names}
    for _ in range(steps):
        name, item = mixture.draw()
        drawn[name].append(item)
    for at, (size, _, _) in enumerate(sizes):
        items = drawn[str(at)]
        passes = [items[start : start + size] for start in range(0, len(items), size)]
        assert mixture.epochs[str(at)] == len(items) // size
        for one in passes[: len(items) // size]:
            assert sorted(one) == sorted(named(chr(97 + at), size))
        assert len(set(passes[-1]) if passes else ()) == len(passes[-1] if passes else ())


@pytest.mark.parametrize("seed", range(5))
def test_weights_converge(seed: int) -> None:
    num_draws, weights = 20_000, [5.0, 3.0, 2.0]
    mixture = build([(7, False, 5.0), (11, True, 3.0), (13, False, 2.0)], seed, 4)
    counts = Counter(mixture.draw()[0] for _ in range(num_draws))
    for at, weight in enumerate(weights):
        share = weight / sum(weights)
        deviation = abs(counts[str(at)] - num_draws * share) / math.sqrt(num_draws * share * (1 - share))
        assert deviation < 4.5, f"source {at}: {deviation:.1f} standard deviations off"


def test_orders_differ_between_passes_seeds_and_sources() -> None:
    def passes(seed: int, source: object) -> list[list[str]]:
        mixture = data.Mixture([(source, 1.0)], seed, buffer_size=20)  # type: ignore[list-item]
        return [[next(mixture) for _ in range(50)] for _ in range(3)]

    for source in (named("a", 50), Reread(named("a", 50))):
        orders = passes(1, source)
        assert len({tuple(order) for order in orders}) == 3
        assert orders == passes(1, source)
        assert orders != passes(2, source)
        assert all(order != named("a", 50) for order in orders)
    doubled = data.Mixture([(named("a", 50), 1), (named("a", 50), 1)], 1)
    drawn: dict[str, list[str]] = {"0": [], "1": []}
    while not all(doubled.epochs.values()):
        name, item = doubled.draw()
        drawn[name].append(item)
    assert drawn["0"][:50] != drawn["1"][:50]


def test_a_short_buffer_shuffles_all_the_same() -> None:
    mixture = data.Mixture([(Reread(named("a", 1000)), 1)], 0, buffer_size=100)
    places = [int(next(mixture)[1:]) for _ in range(1000)]
    moved = [abs(place - index) for index, place in enumerate(places)]
    assert 50 < sum(moved) / len(moved) < 200, "items move by about the size of the buffer"


def test_wrong_settings() -> None:
    for sources, message in (
        ([], "at least one source"),
        ([(["a"], 0)], "weights must be positive"),
        ([(["a"], float("nan"))], "weights must be positive"),
        ([(iter(["a"]), 1)], "is an iterator, which can be read once only"),
    ):
        with pytest.raises(UsageError, match=message):
            data.Mixture(sources, 0)  # type: ignore[arg-type, misc]
    with pytest.raises(UsageError, match="as many different names"):
        data.Mixture([(["a"], 1), (["b"], 1)], 0, names=["x", "x"])
    with pytest.raises(UsageError, match="buffer_size"):
        data.Mixture([(["a"], 1)], 0, buffer_size=0)
    with pytest.raises(DataError, match="source '0' of the mixture is empty"):
        data.Mixture([([], 1)], 0)
    with pytest.raises(DataError, match="source '0' of the mixture is empty"):
        next(data.Mixture([(Reread([]), 1)], 0))


def test_a_state_of_other_data_or_settings_is_refused() -> None:
    mixture = data.Mixture([(named("a", 9), 1), (Reread(named("b", 9)), 1)], 3, names=["x", "y"])
    for _ in range(9):
        next(mixture)
    saved = mixture.state()
    assert all(source["drawn"] for source in saved["sources"].values())

    def other(first: list[str], second: list[str], weight: float = 1, seed: int = 3) -> data.Mixture[str]:
        return data.Mixture([(first, 1), (Reread(second), weight)], seed, names=["x", "y"])

    with pytest.raises(DataError, match="seed was 3 and is 4"):
        other(named("a", 9), named("b", 9), seed=4).restore(saved)
    with pytest.raises(DataError, match="weights was"):
        other(named("a", 9), named("b", 9), weight=2).restore(saved)
    with pytest.raises(DataError, match="lengths was"):
        other(named("a", 8), named("b", 9)).restore(saved)
    with pytest.raises(DataError, match="source 'x' changed since the state was saved"):
        other(named("z", 9), named("b", 9)).restore(saved)
    with pytest.raises(DataError, match="source 'y' changed since the state was saved"):
        other(named("a", 9), named("z", 9)).restore(saved)
    with pytest.raises(DataError, match="source 'y' is shorter"):
        other(named("a", 9), named("b", 1)).restore(saved)
    with pytest.raises(DataError, match="mixture state of version 0"):
        mixture.restore({**saved, "version": 0})


def test_a_streamed_file_is_mixed_in_constant_memory(jsonl: Callable[..., Path]) -> None:
    path = jsonl([{"text": f"{index} " + "x" * 5000} for index in range(3000)])  # 15 MB
    mixture = data.Mixture(
        [(data.stream(path, kind="text"), 1), (data.load(path, limit=5, kind="text"), 0.1)], 0, buffer_size=50
    )
    tracemalloc.start()
    seen = {mixture.draw()[1].id for _ in range(3000)}
    saved = mixture.state()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(seen) > 2600
    assert peak < 2_000_000
    assert len(json.dumps(saved)) < 1000
