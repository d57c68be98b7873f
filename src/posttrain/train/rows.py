"""Examples as checked arrays: what can be wrong with an example is found here, before any work is done.

T tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from posttrain.core import Example, TokenSequence, TrainError


@dataclass(frozen=True, kw_only=True)
class SequenceRow:
    """One sequence as arrays."""

    tokens_T: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]  # positions t ≥ 1 whose token is a target, ascending
    columns: dict[str, npt.NDArray[np.float32]]  # T each


@dataclass(frozen=True, kw_only=True)
class ExampleRow:
    """One example as arrays."""

    id: str
    group: str
    sequences: tuple[SequenceRow, ...]
    scalars: dict[str, float]

    @property
    def num_tokens(self) -> int:
        """Tokens of all its sequences."""
        return sum(len(sequence.tokens_T) for sequence in self.sequences)

    @property
    def num_targets(self) -> int:
        """Target tokens of all its sequences."""
        return sum(len(sequence.targets) for sequence in self.sequences)


def to_rows(
    examples: Sequence[Example], *, vocab_size: int | None = None, max_positions: int | None = None
) -> list[ExampleRow]:
    """Check examples and turn them into arrays.

    Args:
        examples: what to train on. All carry the same columns and scalars.
        vocab_size: token ids must be below it.
        max_positions: sequences must not be longer.

    Raises:
        TrainError: names the example, the field and the position that is wrong: an empty example or sequence; mask or
            column of another length than the tokens; mask[0] True (nothing predicts the first token); a token outside
            the vocabulary; a sequence longer than the model's positions; NaN or infinite numbers; a column or scalar
            that other examples have and this one lacks.
    """
    rows = [_example_row(example, vocab_size, max_positions) for example in examples]
    _check_alike(rows)
    return rows


def _example_row(example: Example, vocab_size: int | None, max_positions: int | None) -> ExampleRow:
    where = f"example {example.id!r}"
    if not example.sequences:
        raise TrainError(f"{where} has no sequences")
    for name, value in example.scalars.items():
        if not np.isfinite(value):
            raise TrainError(f"{where}: scalar {name!r} is {value}")
    several = len(example.sequences) > 1
    sequences = tuple(
        _sequence_row(sequence, f"{where}, sequence {index}" if several else where, vocab_size, max_positions)
        for index, sequence in enumerate(example.sequences)
    )
    return ExampleRow(id=example.id, group=example.group, sequences=sequences, scalars=example.scalars)


def _sequence_row(
    sequence: TokenSequence, where: str, vocab_size: int | None, max_positions: int | None
) -> SequenceRow:
    length = len(sequence.tokens)
    if length == 0:
        raise TrainError(f"{where} has no tokens")
    if max_positions is not None and length > max_positions:
        raise TrainError(
            f"{where} has {length} tokens, but the model has {max_positions} positions: truncate or drop it"
        )
    if len(sequence.mask) != length:
        raise TrainError(f"{where}: the mask has {len(sequence.mask)} entries for {length} tokens")
    if sequence.mask[0]:
        raise TrainError(f"{where}: mask[0] is True, but nothing predicts the first token: set it to False")
    tokens_T = np.asarray(sequence.tokens, dtype=np.int64)
    if tokens_T.min() < 0 or (vocab_size is not None and tokens_T.max() >= vocab_size):
        bad = int(tokens_T.min() if tokens_T.min() < 0 else tokens_T.max())
        raise TrainError(f"{where}: token id {bad} is outside the model's vocabulary of {vocab_size}")
    targets = np.flatnonzero(np.asarray(sequence.mask, dtype=np.bool_))
    columns = {name: _column(values, length, name, where) for name, values in sequence.columns.items()}
    return SequenceRow(tokens_T=tokens_T, targets=targets, columns=columns)


def _column(values: Sequence[float], length: int, name: str, where: str) -> npt.NDArray[np.float32]:
    if len(values) != length:
        raise TrainError(f"{where}: column {name!r} has {len(values)} values for {length} tokens")
    column_T = np.asarray(values, dtype=np.float32)
    finite_T = np.isfinite(column_T)
    if not finite_T.all():
        position = int(np.flatnonzero(~finite_T)[0])
        raise TrainError(f"{where}: column {name!r} is {values[position]} at position {position}")
    return column_T


def _check_alike(rows: Sequence[ExampleRow]) -> None:
    columns = {name for row in rows for sequence in row.sequences for name in sequence.columns}
    scalars = {name for row in rows for name in row.scalars}
    for row in rows:
        missing = {name for sequence in row.sequences for name in columns - sequence.columns.keys()}
        if missing:
            raise TrainError(f"example {row.id!r} lacks the column {min(missing)!r}, which others of the step have")
        if scalars - row.scalars.keys():
            name = min(scalars - row.scalars.keys())
            raise TrainError(f"example {row.id!r} lacks the scalar {name!r}, which others of the step have")
