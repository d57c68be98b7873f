"""What an objective sees of a micro-batch: flat tensors, and the denominators of the whole step.

N tokens of the micro-batch, end to end; P target positions among them; S sequences; E examples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from posttrain.train.rows import ExampleRow

_SHARED = "group:"  # how the key of a group begins; that of an example without one begins otherwise


class Denominators(NamedTuple):
    """Counts over the whole step: all micro-batches (and, summed elementwise, all ranks).

    Only what carries at least one target is counted, so work that failed and was masked out dilutes nothing.
    """

    tokens: int  # target tokens
    sequences: int  # sequences with a target
    examples: int  # examples with a target
    groups: int  # distinct groups among them; an example without a group is one of its own

    @classmethod
    def of(cls, rows: Sequence[ExampleRow]) -> Denominators:
        """Count a step's examples."""
        live = [row for row in rows if row.num_targets]
        return cls(
            tokens=sum(row.num_targets for row in live),
            sequences=sum(bool(len(sequence.targets)) for row in live for sequence in row.sequences),
            examples=len(live),
            groups=len({_group_key(row) for row in live}),
        )


class StepCounts(NamedTuple):
    """What a step adds up to, on all ranks, beyond what any micro-batch sees."""

    denominators: Denominators
    groups: dict[str, int]  # targets of each group, from `group_tokens`
    num_examples: int  # those without a target too
    num_tokens: int  # of examples with a target, prompts included

    @classmethod
    def of(cls, rows: Sequence[ExampleRow]) -> StepCounts:
        """Count a step's examples, or one rank's."""
        live = [row for row in rows if row.num_targets]
        num_tokens = sum(row.num_tokens for row in live)
        return cls(Denominators.of(live), group_tokens(live), len(rows), num_tokens)

    @classmethod
    def over(cls, ranks: Sequence[StepCounts], own: int) -> StepCounts:
        """The sum over ranks. A group may be spread over several; an example without one is its rank's alone.

        Args:
            ranks: everybody's counts.
            own: the rank whose micro-batches these counts are for.
        """
        if len(ranks) == 1:
            return ranks[0]
        shared: Counter[str] = Counter()
        for counts in ranks:
            shared.update({key: num for key, num in counts.groups.items() if key.startswith(_SHARED)})
        lonely = {key: num for key, num in ranks[own].groups.items() if not key.startswith(_SHARED)}
        num_lonely = sum(not key.startswith(_SHARED) for counts in ranks for key in counts.groups)
        tokens, sequences, examples, _ = (sum(each) for each in zip(*(c.denominators for c in ranks), strict=True))
        return cls(
            Denominators(tokens, sequences, examples, len(shared) + num_lonely),
            {**shared, **lonely},
            sum(counts.num_examples for counts in ranks),
            sum(counts.num_tokens for counts in ranks),
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One packed micro-batch. Everything with suffix _P is aligned with `TokenStats.logprobs_N`, target by target."""

    tokens_N: Tensor  # int64
    lengths: tuple[int, ...]  # S, tokens of each sequence; they sum to N
    target_P: Tensor  # int64, indices into tokens_N of the targets
    sequence_P: Tensor  # int64, which sequence of the micro-batch
    example_S: Tensor  # int64, which example of the micro-batch
    index_S: Tensor  # int64, which sequence of its example: 0 is the first (of a pair: the chosen)
    columns: dict[str, Tensor]  # P each, float32: advantages, old_logprobs, ref_logprobs, sampler_logprobs …
    scalars: dict[str, Tensor]  # E each, float32
    group_tokens_E: Tensor  # float32, targets of the example's group in the whole step
    ids: tuple[str, ...]  # E, of the examples
    denominators: Denominators  # of the whole step

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.lengths)

    @property
    def num_examples(self) -> int:
        """E."""
        return len(self.ids)

    @property
    def targets_P(self) -> Tensor:
        """The target token ids."""
        return self.tokens_N[self.target_P]

    @property
    def example_P(self) -> Tensor:
        """Which example of the micro-batch each target belongs to."""
        return self.example_S[self.sequence_P]


def group_tokens(rows: Sequence[ExampleRow]) -> dict[str, int]:
    """Targets of each group of a step."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts[_group_key(row)] += row.num_targets
    return dict(counts)


def build_batch(
    rows: Sequence[ExampleRow],
    denominators: Denominators,
    groups: dict[str, int],
    device: torch.device,
) -> Batch:
    """Lay the sequences of some examples end to end.

    Args:
        rows: the examples of this micro-batch, in order; the sequences of an example stay together, in order.
        denominators: of the whole step.
        groups: targets of each group in the whole step, from `group_tokens`.
        device: where the tensors go.
    """
    sequences = [sequence for row in rows for sequence in row.sequences]
    lengths = tuple(len(sequence.tokens_T) for sequence in sequences)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    num_targets = [len(sequence.targets) for sequence in sequences]
    names = sequences[0].columns if sequences else {}

    def joined(values: list[npt.NDArray[Any]]) -> Tensor:
        return torch.from_numpy(np.concatenate(values)).to(device, non_blocking=True)

    def floats(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    return Batch(
        tokens_N=joined([sequence.tokens_T for sequence in sequences]),
        lengths=lengths,
        target_P=joined([sequence.targets + start for sequence, start in zip(sequences, starts, strict=True)]),
        sequence_P=joined([np.repeat(np.arange(len(sequences)), num_targets)]),
        example_S=joined([np.repeat(np.arange(len(rows)), [len(row.sequences) for row in rows])]),
        index_S=joined([np.arange(len(row.sequences)) for row in rows]),
        columns={name: joined([row.columns[name][row.targets] for row in sequences]) for name in names},
        scalars={name: floats([row.scalars[name] for row in rows]) for name in rows[0].scalars},
        group_tokens_E=floats([groups[_group_key(row)] for row in rows]),
        ids=tuple(row.id for row in rows),
        denominators=denominators,
    )


def _group_key(row: ExampleRow) -> str:
    return f"{_SHARED}{row.group}" if row.group else f"example:{row.id}"
