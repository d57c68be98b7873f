"""Decoding steps recorded once and replayed: on an accelerator the host then launches one thing per step, not hundreds.

A recorded step has fixed shapes and addresses. Rows are filled up to one of a few batch sizes, lengths to one of a few
capacities; inputs are copied into the step's own tensors, the result is read from its own output. Each pair of sizes is
recorded when it is first needed. The bookkeeping is device-independent; `CudaRecorder` has not been run on a GPU.

N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SHORTEST = 128  # the least capacity that a step is recorded for
_WARM_UPS = 2  # runs before a recording: libraries choose their kernels and take their memory in the first

Step = Callable[[Tensor, Tensor, int], Tensor]  # tokens N1, lengths N and capacity to logits NV


class Record(Protocol):
    """Records what a function launches: gives the tensor that it returned, and what launches it again."""

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Run `work` once, recording."""
        ...


class CudaRecorder:
    """CUDA graphs that share one pool of memory: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Run `work` a few times aside, then record it."""
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = work()
        self._pool = graph.pool()
        return out, graph.replay


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    logits_NV: Tensor
    replay: Callable[[], None]


class StepGraphs:
    """A decoding step for any number of rows, by recordings for a few."""

    def __init__(self, step: Step, *, num_slots: int, max_length: int, device: torch.device, record: Record) -> None:
        """Lay out the inputs.

        Args:
            step: one decoding step of the first N slots; reads its tensors and what else stays at its address.
            num_slots: the most rows.
            max_length: the most tokens that a row has.
            device: of the step.
            record: `CudaRecorder()`, or what stands for it in a test.
        """
        self._step, self._record = step, record
        self._num_slots, self._max_length = num_slots, max_length
        # Both columns side by side: one copy to the device a step, from memory that the device reads by itself.
        self._host = torch.zeros(2, num_slots, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._inputs = torch.zeros(2, num_slots, dtype=torch.int64, device=device)
        self._recorded: dict[tuple[int, int], _Recorded] = {}

    @property
    def num_recorded(self) -> int:
        """Pairs of sizes that have been needed so far."""
        return len(self._recorded)

    def sizes(self, num_rows: int, longest: int) -> tuple[int, int]:
        """Rows and capacity of the recording that fits: powers of two, from 32 rows on multiples of 32."""
        rows = 1 << (num_rows - 1).bit_length() if num_rows <= 32 else -(-num_rows // 32) * 32
        capacity = max(_SHORTEST, 1 << longest.bit_length())  # one more token than is cached
        return min(rows, self._num_slots), min(capacity, self._max_length)

    def run(self, last_N: NDArray[np.int64], lengths_N: NDArray[np.int64]) -> Tensor:
        """Logits NV of the rows' next tokens; good until the next run. Idle slots beside them may be written to."""
        num = len(last_N)
        rows, capacity = self.sizes(num, int(lengths_N.max()))
        self._host.zero_()
        self._host[0, :num], self._host[1, :num] = torch.from_numpy(last_N), torch.from_numpy(lengths_N)
        self._inputs.copy_(self._host, non_blocking=True)
        found = self._recorded.get((rows, capacity))
        if found is None:
            tokens_N1, lengths = self._inputs[0, :rows, None], self._inputs[1, :rows]
            logits_NV, replay = self._record(lambda: self._step(tokens_N1, lengths, capacity))
            found = _Recorded(logits_NV=logits_NV, replay=replay)
            self._recorded[rows, capacity] = found
        found.replay()
        return found.logits_NV[:num]

    def clear(self) -> None:
        """Forget every recording: the weights are elsewhere now."""
        self._recorded.clear()
