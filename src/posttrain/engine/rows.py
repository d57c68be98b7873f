"""The running rows: what each has sampled so far and how it goes on, as columns of numbers.

S slots, M tokens of capacity.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from posttrain.core import Completion, Sampling, StopReason, TextTokenizer
from posttrain.engine.generation import Generation, StreamEvent
from posttrain.engine.sampling import RowSampling
from posttrain.engine.text import TextCursor

# One record per slot, all fields eight bytes wide so that a column can be handed to torch as it is.
_COLUMNS = np.dtype(
    [
        ("seed", np.uint64),
        ("temperature", np.float64),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("num_top", np.int64),
        ("max_tokens", np.int64),
        ("ignore_eos", np.int64),
        ("watched", np.int64),  # its text, stop tokens or top logprobs need a look at every token
        ("deadline", np.float64),
        ("length", np.int64),  # tokens whose keys and values are cached
        ("generated", np.int64),  # tokens sampled
        ("last", np.int64),  # the newest token, not cached yet
        ("first_version", np.int64),
        ("last_version", np.int64),
        ("running", np.int64),  # 1 while the slot has a row
    ]
)


@dataclass(kw_only=True)
class Row:
    """What a running row has besides its numbers."""

    generation: Generation
    index: int  # which sibling
    stop_tokens: frozenset[int] = frozenset()
    cursor: TextCursor | None = None  # rows that stream or have stop strings
    candidates: frozenset[int] | None = None  # tokens that may complete a stop string; None: all
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    num_emitted: int = 0


class Rows:
    """All slots' rows. Running rows are the first `num`, without holes once `compact` has run."""

    def __init__(self, num_slots: int, max_length: int, vocab_size: int) -> None:
        self.table: NDArray[np.void] = np.zeros(num_slots, dtype=_COLUMNS)
        self.tokens_SM = np.zeros((num_slots, max_length), dtype=np.int64)
        self.logprobs_SM = np.zeros((num_slots, max_length), dtype=np.float32)
        self.policy_logprobs_SM = np.zeros((num_slots, max_length), dtype=np.float32)
        self.rows: list[Row | None] = [None] * num_slots
        self.num = 0  # slots in use are below it
        self.num_running = 0
        self._vocab_size = vocab_size
        self.num_changes = 0  # starts, ends and moves so far
        self._sampling: RowSampling | None = None

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values running rows hold."""
        return int((self.table["length"] * self.table["running"]).sum())

    def free_slots(self, count: int) -> list[int]:
        """The lowest free slots, holes first."""
        holes = [slot for slot in range(self.num) if self.rows[slot] is None]
        return (holes + list(range(self.num, len(self.rows))))[:count]

    def start(self, slot: int, row: Row, sampling: Sampling, prompt_length: int, version: int) -> None:
        """Put a row into a free slot."""
        generation = row.generation
        self.table[slot] = (
            generation.seed(row.index),
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.min_p,
            sampling.top_logprobs,
            sampling.max_tokens,
            sampling.ignore_eos,
            row.cursor is not None or bool(row.stop_tokens) or sampling.top_logprobs > 0,
            generation.deadline,
            prompt_length,
            0,
            0,
            version,
            version,
            1,
        )
        self.rows[slot] = row
        self.num = max(self.num, slot + 1)
        self.num_running += 1
        self._change()

    def release(self, slot: int) -> None:
        """Free a slot."""
        self.rows[slot] = None
        self.table["running"][slot] = 0
        self.num_running -= 1
        self._change()

    def holes(self) -> list[tuple[int, int]]:
        """Moves (source, target) that leave no holes; `move` does each in turn."""
        moves = []
        free = [slot for slot in range(self.num) if self.rows[slot] is None]
        last = self.num - 1
        for hole in free:
            while last > hole and self.rows[last] is None:
                last -= 1
            if last <= hole:
                break
            moves.append((last, hole))
            last -= 1
        return moves

    def move(self, source: int, target: int) -> None:
        """Take a row's numbers to another slot."""
        generated = int(self.table["generated"][source])
        self.table[target] = self.table[source]
        for buffer in (self.tokens_SM, self.logprobs_SM, self.policy_logprobs_SM):
            buffer[target, :generated] = buffer[source, :generated]
        self.table["running"][source] = 0
        self.rows[target], self.rows[source] = self.rows[source], None
        self._change()

    def _change(self) -> None:
        self.num_changes += 1
        self._sampling = None

    def sampling(self, device: torch.device) -> RowSampling:
        """How the first `num` rows sample; kept until the rows change."""
        if self._sampling is None:
            self._sampling = self.sampling_of(np.arange(self.num), device)
        return self._sampling

    def sampling_of(self, slots: NDArray[np.int64], device: torch.device) -> RowSampling:
        """How some rows sample."""
        table = self.table[slots]
        columns = {name: torch.from_numpy(table[name].copy()).to(device) for name in ("top_k", "top_p", "min_p")}
        heat = torch.from_numpy(table["temperature"].copy()).to(device)
        most = int(table["num_top"].max(initial=0))
        return RowSampling.of(heat, columns["top_k"], columns["top_p"], columns["min_p"], most, self._vocab_size)

    def completion(
        self, slot: int, reason: StopReason, tokenizer: TextTokenizer, error: str | None = None
    ) -> tuple[Completion, str]:
        """The finished record of a row, and the piece of its text that was not streamed yet."""
        row = self.rows[slot]
        assert row is not None
        record = self.table[slot]
        generated = int(record["generated"])
        tokens = self.tokens_SM[slot, :generated].tolist()
        textual = tokens[:-1] if reason is StopReason.EOS else tokens
        piece = ""
        if row.cursor is None:
            text = tokenizer.decode(textual)
        else:
            text = row.cursor.finish(textual)
            piece = row.cursor.delta()
            if row.cursor.stopped and reason is StopReason.LENGTH:
                reason = StopReason.STOP
        completion = Completion(
            tokens=tuple(tokens),
            logprobs=tuple(self.logprobs_SM[slot, :generated].tolist()),
            policy_logprobs=tuple(self.policy_logprobs_SM[slot, :generated].tolist()),
            text=text,
            stop_reason=reason,
            index=row.index,
            request_id=row.generation.request.id,
            weight_version=int(record["first_version"]),
            last_weight_version=int(record["last_version"]),
            num_prompt_tokens=len(row.generation.request.prompt),
            top_logprobs=tuple(row.top_logprobs),
            error=error,
        )
        return completion, piece

    def event(self, slot: int, text: str, completion: Completion | None) -> StreamEvent:
        """What a streaming row wrote since its last event."""
        row = self.rows[slot]
        assert row is not None
        start, end = row.num_emitted, int(self.table["generated"][slot])
        row.num_emitted = end
        return StreamEvent(
            index=row.index,
            tokens=tuple(self.tokens_SM[slot, start:end].tolist()),
            text=text,
            logprobs=tuple(self.logprobs_SM[slot, start:end].tolist()),
            policy_logprobs=tuple(self.policy_logprobs_SM[slot, start:end].tolist()),
            top_logprobs=tuple(row.top_logprobs[start:end]),
            completion=completion,
        )
