"""Do two query results say the same? Rows as lists or as multisets, numbers within a tolerance."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal

Value = None | int | float | str | bytes
Row = tuple[Value, ...]
Columns = Literal["same", "any_order", "superset"]

_MAX_PAIRING = 256  # rows that differ only in their numbers and are paired one by one, at most
_MAX_ASSIGNMENTS = 500  # ways to find the gold columns among those given that are tried, at most


def results_match(
    gold: Sequence[Row],
    given: Sequence[Row],
    *,
    ordered: bool,
    columns: Columns = "same",
    tolerance: float = 1e-9,
) -> bool:
    """As `rows_match`, with columns in any order, or besides columns that were not asked for.

    Args:
        gold: rows that should come.
        given: rows that came.
        ordered: whether the order of rows counts.
        columns: "same" in number and order; "any_order" in number; "superset" lets others stand among them.
        tolerance: see `rows_match`.
    """
    if columns == "same":
        return rows_match(gold, given, ordered=ordered, tolerance=tolerance)
    if len(gold) != len(given):
        return False
    if not gold:
        return True
    wanted, there = len(gold[0]), len(given[0])
    if there < wanted or (columns == "any_order" and there != wanted):
        return False

    def same(chosen: Sequence[int], places: Sequence[int]) -> bool:
        left = [tuple(row[place] for place in chosen) for row in gold]
        right = [tuple(row[place] for place in places) for row in given]
        return rows_match(left, right, ordered=ordered, tolerance=tolerance)

    fits = [[other for other in range(there) if same([one], [other])] for one in range(wanted)]
    tries = itertools.islice(_assignments(fits), _MAX_ASSIGNMENTS)
    return any(same(range(wanted), places) for places in tries)


def _assignments(fits: Sequence[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    """Every way to give each column one that fits it, none twice."""

    def extend(chosen: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(chosen) == len(fits):
            yield chosen
            return
        for place in fits[len(chosen)]:
            if place not in chosen:
                yield from extend((*chosen, place))

    return extend(())


def rows_match(gold: Sequence[Row], given: Sequence[Row], *, ordered: bool, tolerance: float = 1e-9) -> bool:
    """True where both results hold the same rows.

    Columns count by position, not by name. Integers equal floats of the same value; two integers must be equal, other
    numbers within `tolerance` (relative and absolute); texts, blobs and NULL must be the same, and a text is no number.

    Args:
        gold: rows that should come.
        given: rows that came.
        ordered: whether their order counts; otherwise only how often each row comes.
        tolerance: largest difference of two numbers, relative to the larger one or absolute.
    """
    if len(gold) != len(given):
        return False
    if gold and len(gold[0]) != len(given[0]):
        return False
    if ordered:
        return all(_same_row(left, right, tolerance) for left, right in zip(gold, given, strict=True))
    if Counter(gold) == Counter(given):
        return True
    left_groups, right_groups = _by_rest(gold), _by_rest(given)
    if left_groups.keys() != right_groups.keys():
        return False
    return all(_same_numbers(rows, right_groups[key], tolerance) for key, rows in left_groups.items())


def _same_value(left: Value, right: Value, tolerance: float) -> bool:
    if isinstance(left, float | int) and isinstance(right, float | int):
        return left == right or (
            (isinstance(left, float) or isinstance(right, float))
            and math.isclose(left, right, rel_tol=tolerance, abs_tol=tolerance)
        )
    return type(left) is type(right) and left == right


def _same_row(left: Row, right: Row, tolerance: float) -> bool:
    return all(_same_value(one, other, tolerance) for one, other in zip(left, right, strict=True))


def _by_rest(rows: Sequence[Row]) -> dict[tuple[object, ...], list[Row]]:
    """Rows by everything in them that is not a number."""
    groups: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(float if isinstance(value, float | int) else value for value in row)].append(row)
    return groups


def _same_numbers(left: list[Row], right: list[Row], tolerance: float) -> bool:
    """Whether rows that are alike in all but numbers can be paired within the tolerance."""
    if len(left) != len(right):
        return False
    numbers = [position for position, value in enumerate(left[0]) if isinstance(value, float | int)]

    def by_numbers(row: Row) -> list[float | int]:
        return [value for value in (row[position] for position in numbers) if isinstance(value, float | int)]

    left, right = sorted(left, key=by_numbers), sorted(right, key=by_numbers)
    if all(_same_row(one, other, tolerance) for one, other in zip(left, right, strict=True)):
        return True
    if len(left) > _MAX_PAIRING:
        return False
    # Sorting can part two pairs whose first number differs by less than the tolerance: pair them one by one.
    remaining = list(right)
    for one in left:
        position = next((i for i, other in enumerate(remaining) if _same_row(one, other, tolerance)), None)
        if position is None:
            return False
        del remaining[position]
    return True
