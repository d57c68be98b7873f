"""Which examples begin alike, so that their common prefix is computed once, and which of them share a micro-batch.

Siblings of a group share their prompt, the sequences of an example may too. What is shared changes no number but by
rounding (see `models.SharedRow`); it changes how much there is to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from posttrain.models import SharedRow, share
from posttrain.train.packing import pack
from posttrain.train.rows import ExampleRow

_SHORTEST = 8  # tokens of a prefix that is worth a segment of its own


class Unit(NamedTuple):
    """Examples that go into a micro-batch together."""

    members: tuple[int, ...]  # indices of the examples
    prefix: int  # tokens with which all their sequences begin; 0: nothing is shared
    num_tokens: int  # that are computed


class Micro(NamedTuple):
    """A micro-batch: examples in order, and what they share."""

    members: tuple[int, ...]
    units: tuple[Unit, ...]


def units_of(rows: Sequence[ExampleRow], budget: int) -> list[Unit]:
    """Examples by what they share: those of a group, as far as they fit into `budget` computed tokens.

    The members of a group need not be neighbours in `rows`; order is that of their first.
    """
    groups: dict[str | int, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.group or index, []).append(index)
    units = []
    for members in groups.values():
        prefix = common_prefix([sequence.tokens_T for index in members for sequence in rows[index].sequences])
        if prefix < _SHORTEST:
            units += [Unit((index,), 0, rows[index].num_tokens) for index in members]
        else:
            units += _within(rows, members, prefix, budget)
    return units


def micros_of(rows: Sequence[ExampleRow], budget: int, *, shared: bool) -> list[Micro]:
    """Distribute examples over micro-batches of at most `budget` computed tokens (see `packing.pack`).

    Args:
        rows: the examples.
        budget: tokens; what is larger by itself gets a micro-batch of its own.
        shared: whether prefixes are computed once.
    """
    if shared:
        units = units_of(rows, budget)
    else:
        units = [Unit((index,), 0, row.num_tokens) for index, row in enumerate(rows)]
    found = []
    for indices in pack([unit.num_tokens for unit in units], budget):
        chosen = tuple(units[index] for index in indices)
        found.append(Micro(tuple(index for unit in chosen for index in unit.members), chosen))
    return found


def layout_of(micro: Micro, rows: Sequence[ExampleRow]) -> SharedRow:
    """How a micro-batch's sequences lie.

    Args:
        micro: from `micros_of`.
        rows: what it was made of.
    """
    lengths = [len(sequence.tokens_T) for index in micro.members for sequence in rows[index].sequences]
    families: list[int] = []
    prefixes: list[int] = []
    for unit in micro.units:
        num = sum(len(rows[index].sequences) for index in unit.members)
        families += [num] if unit.prefix else [1] * num
        prefixes += [unit.prefix] if unit.prefix else [0] * num
    return share(lengths, families, prefixes)


def common_prefix(sequences: Sequence[npt.NDArray[np.int64]]) -> int:
    """With how many equal tokens all begin, short of the whole of any; 0 for fewer than two."""
    if len(sequences) < 2:
        return 0
    first, *others = sequences
    common = min(len(tokens_T) for tokens_T in sequences) - 1
    for tokens_T in others:
        differ = np.flatnonzero(first[:common] != tokens_T[:common])
        common = int(differ[0]) if len(differ) else common
    return common


def _within(rows: Sequence[ExampleRow], members: Sequence[int], prefix: int, budget: int) -> list[Unit]:
    """A group in as few parts as fit, each with the prefix once."""
    parts: list[tuple[list[int], int]] = []
    for index in members:
        own = rows[index].num_tokens - prefix * len(rows[index].sequences)
        if parts and parts[-1][1] + own <= budget:
            parts[-1] = ([*parts[-1][0], index], parts[-1][1] + own)
        else:
            parts.append(([index], prefix + own))
    found = []
    for indices, num_tokens in parts:
        alone = len(indices) == 1 and len(rows[indices[0]].sequences) == 1
        found.append(Unit(tuple(indices), 0 if alone else prefix, num_tokens))
    return found
