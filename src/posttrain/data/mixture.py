"""A weighted mixture of sources that can be resumed at any item, exactly."""

from __future__ import annotations

import bisect
import itertools
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar, cast

from posttrain.core import DataError, UsageError, content_hash, generator

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

STATE_VERSION = 1


class _Source(Protocol[T_co]):
    """One source of a mixture, shuffled, without end."""

    epoch: int  # passes completed
    drawn: int  # items of the present pass that were given out
    length: int | None

    def draw(self) -> T_co: ...

    def seek(self, epoch: int, drawn: int) -> T_co | None: ...


class Mixture(Generic[T]):
    """Draws from several sources in the proportion of their weights, without end, each shuffled anew at each pass.

        mixture = Mixture([(load("a.jsonl"), 3), (stream("b.jsonl"), 1)], seed=7)
        row = next(mixture)
        saved = mixture.state()            # JSON
        mixture.restore(saved)             # the same rows follow as followed then

    Which source comes next is drawn anew at every step from the seed and the step's number. A source with `len` and
    indices is permuted as a whole; any other re-iterable is shuffled within a buffer, so that memory stays constant
    however long it is. Within a pass, every item is given out exactly once.

    Args:
        sources: pairs of a re-iterable source and its weight, a positive number.
        seed: decides all draws.
        names: of the sources, in reports and states; by default "0", "1" …
        buffer_size: items of a streaming source held at once.

    Raises:
        UsageError: no source, a weight that is not positive, an iterator where a re-iterable is needed.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Iterable[T], float]],
        seed: int,
        *,
        names: Sequence[str] | None = None,
        buffer_size: int = 1024,
    ) -> None:
        if not sources:
            raise UsageError("a mixture needs at least one source")
        if buffer_size < 1:
            raise UsageError(f"buffer_size must be at least 1, not {buffer_size}")
        self.names = tuple(names) if names is not None else tuple(str(index) for index in range(len(sources)))
        if len(self.names) != len(sources) or len(set(self.names)) != len(sources):
            raise UsageError(f"{len(sources)} sources need as many different names, not {self.names}")
        weights = [float(weight) for _, weight in sources]
        if not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise UsageError(f"weights must be positive numbers, not {weights}")
        self.weights = tuple(weight / sum(weights) for weight in weights)
        self.seed = seed
        self.buffer_size = buffer_size
        self.step = 0  # items given out so far
        self._cumulated = list(itertools.accumulate(self.weights))
        self._sources = [
            _shuffled(source, seed, name, buffer_size) for (source, _), name in zip(sources, self.names, strict=True)
        ]
        self._last: list[T | None] = [None] * len(sources)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        return self.draw()[1]

    def draw(self) -> tuple[str, T]:
        """The next item, with the name of the source it comes from.

        Raises:
            DataError: the source is empty, or gives nothing when it is read again.
        """
        index = self._choose(self.step)
        item = self._sources[index].draw()
        self._last[index] = item
        self.step += 1
        return self.names[index], item

    def _choose(self, step: int) -> int:
        if len(self._sources) == 1:
            return 0
        point = generator(self.seed, "mixture", step).random()
        return min(bisect.bisect_right(self._cumulated, point), len(self._sources) - 1)

    @property
    def epochs(self) -> dict[str, int]:
        """Completed passes over each source."""
        return {name: source.epoch for name, source in zip(self.names, self._sources, strict=True)}

    def state(self) -> dict[str, Any]:
        """Where the mixture is, as plain JSON values; constant in size."""
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "settings": self._settings(),
            "sources": {
                name: {
                    "epoch": source.epoch,
                    "drawn": source.drawn,
                    "last": _fingerprint(last) if source.drawn else None,
                }
                for name, source, last in zip(self.names, self._sources, self._last, strict=True)
            },
        }

    def _settings(self) -> dict[str, Any]:
        lengths = {name: source.length for name, source in zip(self.names, self._sources, strict=True)}
        weights = dict(zip(self.names, self.weights, strict=True))
        return {"seed": self.seed, "weights": weights, "buffer_size": self.buffer_size, "lengths": lengths}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken. A streaming source is read again up to there.

        Raises:
            DataError: the state is of a mixture with other settings, or the data is not what it was then.
        """
        if state.get("version") != STATE_VERSION:
            raise DataError(f"mixture state of version {state.get('version')!r}; this is version {STATE_VERSION}")
        then, now = state["settings"], self._settings()
        changed = [f"{key} was {then.get(key)!r} and is {now[key]!r}" for key in now if then.get(key) != now[key]]
        if changed:
            raise DataError(f"this is not the mixture whose state was saved: {'; '.join(changed)}")
        for index, (name, source) in enumerate(zip(self.names, self._sources, strict=True)):
            place = state["sources"][name]
            last = source.seek(int(place["epoch"]), int(place["drawn"]))
            if last is not None and place["last"] is not None and _fingerprint(last) != place["last"]:
                raise DataError(
                    f"source {name!r} changed since the state was saved: its last drawn item is another now"
                )
            self._last[index] = last
        self.step = int(state["step"])


def _fingerprint(item: object) -> str | None:
    """A short hash of an item by which a changed file is noticed; None for items that are no JSON."""
    if item is None:
        return None
    try:
        return content_hash(item)[:16]
    except (TypeError, ValueError):
        return None


def _shuffled(source: Iterable[T], seed: int, name: str, buffer_size: int) -> _Source[T]:
    if hasattr(source, "__len__") and hasattr(source, "__getitem__") and not isinstance(source, Mapping):
        return _Permuted(cast(Sequence[T], source), seed, name)
    if iter(source) is source:
        raise UsageError(
            f"source {name!r} is an iterator, which can be read once only: give a list or an object that can be "
            "iterated again, such as data.stream(path)"
        )
    return _Buffered(source, seed, name, buffer_size)


class _Permuted(Generic[T]):
    """A sequence in an order drawn for each pass."""

    def __init__(self, items: Sequence[T], seed: int, name: str) -> None:
        if len(items) == 0:
            raise DataError(f"source {name!r} of the mixture is empty")
        self.items, self.seed, self.name = items, seed, name
        self.length: int | None = len(items)
        self.epoch = self.drawn = 0
        self.order = self._permutation(0)

    def _permutation(self, epoch: int) -> array[int]:
        order = array("q", range(len(self.items)))
        generator(self.seed, "order", self.name, epoch).shuffle(order)
        return order

    def draw(self) -> T:
        item = self.items[self.order[self.drawn]]
        self.drawn += 1
        if self.drawn == len(self.items):
            self.epoch, self.drawn = self.epoch + 1, 0
            self.order = self._permutation(self.epoch)
        return item

    def seek(self, epoch: int, drawn: int) -> T | None:
        """Go to a place; gives the item drawn last in this pass."""
        if not 0 <= drawn < len(self.items):
            raise DataError(f"source {self.name!r} has {len(self.items)} items; the state says {drawn} were drawn")
        self.epoch, self.drawn = epoch, drawn
        self.order = self._permutation(epoch)
        return self.items[self.order[drawn - 1]] if drawn else None


class _Buffered(Generic[T]):
    """A re-iterable shuffled within a buffer: a draw takes a random item of it and puts the next one in its place."""

    def __init__(self, items: Iterable[T], seed: int, name: str, buffer_size: int) -> None:
        self.items, self.seed, self.name, self.buffer_size = items, seed, name, buffer_size
        self.length: int | None = None
        self.epoch = self.drawn = 0
        self.buffer: list[T] = []
        self.reader: Iterator[T] | None = None  # None: this pass has not begun

    def _begin(self) -> Iterator[T]:
        self.random = generator(self.seed, "order", self.name, self.epoch)
        reader = iter(self.items)
        self.buffer = list(itertools.islice(reader, self.buffer_size))
        if not self.buffer:
            again = " when it is read again" if self.epoch else ""
            raise DataError(f"source {self.name!r} of the mixture is empty{again}")
        return reader

    def draw(self) -> T:
        if self.reader is None:
            self.reader = self._begin()
        place = self.random.randrange(len(self.buffer))
        item = self.buffer[place]
        try:
            self.buffer[place] = next(self.reader)
        except StopIteration:
            self.buffer[place] = self.buffer[-1]
            self.buffer.pop()
        self.drawn += 1
        if not self.buffer:
            self.epoch, self.drawn, self.reader = self.epoch + 1, 0, None
        return item

    def seek(self, epoch: int, drawn: int) -> T | None:
        """Go to a place by drawing up to it; gives the item drawn last in this pass."""
        self.epoch, self.drawn, self.reader, self.buffer = epoch, 0, None, []
        last = None
        for _ in range(drawn):
            last = self.draw()
            if self.epoch != epoch:
                raise DataError(f"source {self.name!r} is shorter than when the state was saved")
        return last
