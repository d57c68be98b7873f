"""Continuous batching, one step at a time: expire, read prompts, start rows, sample one token for every row.

N running rows, V vocabulary. No threads here: `LocalEngine` owns the thread that calls `step`.
"""

from __future__ import annotations

import math
import time
from collections import deque

import numpy as np

from posttrain.core import Completion, StopReason, TextTokenizer
from posttrain.engine.compiled import CompiledDecoder, fits
from posttrain.engine.compiled_decoding import CompiledDecoding, Slots
from posttrain.engine.decoding import Decoding, PlainDecoding
from posttrain.engine.draws import Drawn
from posttrain.engine.generation import Generation, StreamEvent, wake
from posttrain.engine.prefill import PromptReader, ReadPrompt
from posttrain.engine.prefixes import PrefixStore
from posttrain.engine.rows import Row, Rows
from posttrain.engine.text import StopCandidates, TextCursor
from posttrain.models import Decoder


class Stepper:
    """Waiting requests, running rows and their cache."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: TextTokenizer,
        *,
        num_slots: int,
        max_length: int,
        prefill_tokens: int,
        prefix_tokens: int,
        shared: bool = True,
    ) -> None:
        config, weight = model.config, next(model.parameters())
        self.model, self.tokenizer = model, tokenizer
        self._shared = shared  # somebody else may change the weights between two steps
        self.version = 0
        self.waiting: deque[Generation] = deque()
        self.ready: deque[ReadPrompt] = deque()  # prompts read, siblings still to start
        self.rows = Rows(num_slots, max_length, config.vocab_size)
        compiled = CompiledDecoder(model, max_length) if fits(config, weight.dtype, weight.device) else None
        self.decoding: Decoding
        if compiled is None:
            self.decoding = PlainDecoding(model, self.rows, max_length)
        else:
            self.decoding = CompiledDecoding(compiled, model, self.rows, max_length)
        self.prefixes = PrefixStore(prefix_tokens)
        self.reader = PromptReader(model, self.prefixes, prefill_tokens, compiled)
        self.num_steps = 0
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self._touched: dict[int, Generation] = {}
        self._is_eos = np.zeros(config.vocab_size, dtype=bool)
        self._is_eos[[token for token in tokenizer.eos_ids if token < config.vocab_size]] = True
        self._stop_candidates = StopCandidates(tokenizer, config.vocab_size)
        self._may_expire = False

    # Requests in and out

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self.waiting or self.ready or self.reader.long or self.rows.num_running)

    def add(self, generation: Generation) -> None:
        """Queue a request, unless it was withdrawn before it came here."""
        if generation.done:
            return
        self.waiting.append(generation)
        self._may_expire |= generation.deadline != math.inf

    def withdraw(self, generation: Generation, reason: StopReason, error: str | None = None) -> None:
        """End a request wherever it is; siblings that run keep what they have written."""
        if generation.done:
            return
        if generation in self.waiting:
            self.waiting.remove(generation)
        self.ready = deque(prompt for prompt in self.ready if prompt.generation is not generation)
        self.reader.long = deque(prompt for prompt in self.reader.long if prompt.generation is not generation)
        for slot in range(self.rows.num):
            row = self.rows.rows[slot]
            if row is not None and row.generation is generation:
                self._finish(slot, reason, error)
        for index in generation.unfinished():
            self._finish_unstarted(generation, index, reason, error)
        self.deliver()

    def in_flight(self) -> list[Generation]:
        """Every request that has not ended, wherever it is."""
        being_read = [
            *(prompt.generation for prompt in self.ready),
            *(prompt.generation for prompt in self.reader.long),
        ]
        running = [row.generation for row in self.rows.rows[: self.rows.num] if row is not None]
        everyone = [*self.waiting, *being_read, *running]
        return list({id(generation): generation for generation in everyone}.values())

    def swap(self, model: Decoder, version: int) -> None:
        """Go on with other weights. Running rows keep their cache; prompts not started yet are read again."""
        self.model = self.reader.model = model
        self.version = version
        self.decoding.refresh(model, changed=True)
        self.prefixes.clear()
        again = [*(prompt.generation for prompt in self.ready), *(prompt.generation for prompt in self.reader.long)]
        self.ready.clear()
        self.reader.long.clear()
        self.waiting.extendleft(reversed(again))

    def deliver(self) -> None:
        """Wake the callers of everything that changed."""
        wake(self._touched.values())
        self._touched.clear()

    # One step

    def step(self) -> None:
        """Admit what fits, then sample one token for every running row."""
        self.num_steps += 1
        if self._shared:
            self.decoding.refresh(self.model)
        if self._may_expire:
            self._expire()
        self._start_ready()
        if self.reader.long:
            self._read_long()
        self._read_waiting()
        self._start_ready()
        self.decoding.compact()
        if self.rows.num_running:
            self._decode()
        self.deliver()

    def _expire(self) -> None:
        now = time.monotonic()
        everyone = self.in_flight()
        for generation in everyone:
            if generation.deadline <= now:
                self.withdraw(generation, StopReason.TIMEOUT, f"not finished after {generation.timeout_s} s")
        self._may_expire = any(g.deadline != math.inf and not g.done for g in everyone)

    def _read_long(self) -> None:
        """One chunk of a long prompt; the other half of the budget is for those who wait behind it."""
        budget = max(1, self.reader.budget // 2) if self.waiting else self.reader.budget
        generation = self.reader.long[0].generation
        try:
            prompt = self.reader.advance(budget)
        except Exception as error:  # noqa: BLE001  a failed forward pass is this request's failure, not the engine's
            self.withdraw(generation, StopReason.ERROR, f"reading the prompt failed: {error!r}")
            return
        if prompt is not None:
            self.ready.append(prompt)

    def _read_waiting(self) -> None:
        """Read as many waiting prompts as slots and budget allow, first come, first served."""
        spare = len(self.rows.rows) - self.rows.num_running - len(self.reader.long)
        spare -= sum(p.generation.request.sampling.n - p.generation.num_started for p in self.ready)
        budget = self.reader.budget // 2 if self.reader.long else self.reader.budget
        chosen: list[Generation] = []
        while self.waiting and spare > 0:
            length = len(self.waiting[0].request.prompt)
            if length > self.reader.budget:
                self.reader.begin(self.waiting.popleft())
                spare -= 1
                continue
            if chosen and length > budget:
                break
            generation = self.waiting.popleft()
            chosen.append(generation)
            budget -= length
            spare -= min(spare, generation.request.sampling.n - generation.num_started)
        if not chosen:
            return
        try:
            self.ready.extend(self.reader.read(chosen))
        except Exception as error:  # noqa: BLE001  a failed forward pass is these requests' failure, not the engine's
            for generation in chosen:
                self.withdraw(generation, StopReason.ERROR, f"reading the prompt failed: {error!r}")

    def _start_ready(self) -> None:
        """Give slots to siblings of prompts that are read, and sample their first token."""
        free = deque(self.rows.free_slots(len(self.rows.rows) - self.rows.num_running)) if self.ready else deque()
        slots: list[int] = []
        prompts: list[ReadPrompt] = []
        while self.ready and free:
            prompt = self.ready[0]
            generation = prompt.generation
            if generation.num_started == 0:
                self.num_prompt_tokens += prompt.length
            while free and generation.num_started < generation.request.sampling.n:
                slot = free.popleft()
                row = self._make_row(generation, generation.num_started)
                self.rows.start(slot, row, generation.request.sampling, prompt.length, self.version)
                generation.num_started += 1
                slots.append(slot)
                prompts.append(prompt)
            if generation.num_started == generation.request.sampling.n:
                self.ready.popleft()
            else:
                prompt.detach()
        if slots:
            chosen = np.array(slots)
            self._write(chosen, self.decoding.first(chosen, prompts))

    def _make_row(self, generation: Generation, index: int) -> Row:
        sampling = generation.request.sampling
        row = Row(generation=generation, index=index, stop_tokens=frozenset(sampling.stop_tokens))
        if sampling.stop:
            row.stop_tokens |= self._stop_candidates.special(sampling.stop)
            row.candidates = self._stop_candidates.tokens(sampling.stop)
        if sampling.stop or generation.streaming:
            row.cursor = TextCursor(self.tokenizer, sampling.stop)
        return row

    def _decode(self) -> None:
        """One token for every running row."""
        slots = self.decoding.running()
        try:
            drawn = self.decoding.decode()
        except Exception as error:  # noqa: BLE001  a failed forward pass is the running rows' failure, not the engine's
            for slot in slots.tolist():
                self._finish(slot, StopReason.ERROR, f"a decoding step failed: {error!r}")
            return
        self._write(slots, drawn)

    def _write(self, slots: Slots, drawn: Drawn) -> None:
        """Write down a token per slot, finish the rows that end."""
        rows, tokens = self.rows, drawn.tokens_N
        table = rows.table[slots]
        places = table["generated"]
        flat = slots * rows.tokens_SM.shape[1] + places
        rows.tokens_SM.put(flat, tokens)
        rows.logprobs_SM.put(flat, drawn.logprobs_N)
        rows.policy_logprobs_SM.put(flat, drawn.policy_logprobs_N)
        ended = self._is_eos[tokens] & (table["ignore_eos"] == 0)
        full = places + 1 >= table["max_tokens"]
        look = ended | full | (table["watched"] != 0) | ~drawn.valid_N
        places += 1
        table["last"], table["last_version"] = tokens, self.version
        rows.table[slots] = table
        self.num_generated_tokens += len(slots)
        for place in np.flatnonzero(look).tolist():
            slot = int(slots[place])
            if not drawn.valid_N[place]:
                self._fail(slot)
                continue
            row = self.rows.rows[slot]
            assert row is not None
            if drawn.tops is not None and (most := int(table["num_top"][place])):
                row.top_logprobs.append(dict(drawn.tops[place][:most]))
            self._look(slot, row, int(tokens[place]), ended=bool(ended[place]), full=bool(full[place]))

    def _look(self, slot: int, row: Row, token: int, *, ended: bool, full: bool) -> None:
        """What a row's newest token means: text to stream, a stop, an end."""
        ended = ended or token in row.stop_tokens
        cursor = row.cursor
        streaming = row.generation.streaming
        if cursor is not None and not ended:
            candidate = row.candidates is None or token in row.candidates or cursor.unsettled
            if streaming or candidate:
                generated = int(self.rows.table["generated"][slot])
                cursor.push(self.rows.tokens_SM[slot, cursor.num_tokens : generated].tolist())
            if cursor.stopped:
                self._finish(slot, StopReason.STOP)
                return
        if ended:
            self._finish(slot, StopReason.EOS)
        elif full:
            self._finish(slot, StopReason.LENGTH)
        elif streaming and cursor is not None:
            row.generation.emit(self.rows.event(slot, cursor.delta(), None))
            self._touched[id(row.generation)] = row.generation

    def _fail(self, slot: int) -> None:
        self.rows.table["generated"][slot] -= 1
        self.num_generated_tokens -= 1
        written = int(self.rows.table["generated"][slot])
        message = f"the model gave NaN or infinite logits after {written} tokens, weights version {self.version}"
        self._finish(slot, StopReason.ERROR, f"{message}: check the weights")

    def _finish(self, slot: int, reason: StopReason, error: str | None = None) -> None:
        """End a running row and free its slot."""
        row = self.rows.rows[slot]
        assert row is not None
        generation = row.generation
        completion, piece = self.rows.completion(slot, reason, self.tokenizer, error)
        if reason is StopReason.ERROR:
            self.decoding.scrub(slot)
        elif self.prefixes.capacity:
            length = int(self.rows.table["length"][slot])
            cached = (*generation.request.prompt, *completion.tokens)[:length]
            self.prefixes.put(cached, self.decoding.store(slot, length))
        if generation.streaming:
            generation.emit(self.rows.event(slot, piece, completion))
        generation.finish(row.index, completion)
        self.rows.release(slot)
        self.decoding.release(slot)
        self._touched[id(generation)] = generation

    def _finish_unstarted(self, generation: Generation, index: int, reason: StopReason, error: str | None) -> None:
        completion = Completion(
            tokens=(),
            logprobs=(),
            policy_logprobs=(),
            text="",
            stop_reason=reason,
            index=index,
            request_id=generation.request.id,
            weight_version=self.version,
            last_weight_version=self.version,
            num_prompt_tokens=len(generation.request.prompt),
            error=error,
        )
        if generation.streaming:
            event = StreamEvent(index=index, tokens=(), text="", logprobs=(), policy_logprobs=(), completion=completion)
            generation.emit(event)
        generation.finish(index, completion)
        self._touched[id(generation)] = generation
