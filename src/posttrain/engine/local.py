"""LocalEngine: the decoder as a sampler, with a thread of its own and weights that can change between steps."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import copy
import threading
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType

import torch
from torch import Tensor

from posttrain.core import (
    Completion,
    EngineError,
    SampleRequest,
    Sampling,
    StopReason,
    TextTokenizer,
    derive_seed,
)
from posttrain.engine.generation import Generation, StreamEvent
from posttrain.engine.stats import EngineStats
from posttrain.engine.stepper import Stepper
from posttrain.models import Decoder

# The thread ends after this long without work and is started again by the next request, so that an engine that was
# never closed does not keep the process or its memory.
_IDLE_S = 2.0


# Closed before the interpreter goes: a thread in the midst of a step would be killed under PyTorch's feet.
_open: weakref.WeakSet[LocalEngine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for engine in list(_open):
        engine.close()


class LocalEngine:
    """Samples from a decoder with continuous batching. Implements `SampleTokens`.

    For a list of requests with seeds, given to an idle engine, the result is the same every time. A request's random
    numbers do not depend on its batch-mates; its logits do so only by floating-point rounding.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: TextTokenizer,
        *,
        max_batch: int = 64,
        max_length: int | None = None,
        prefill_tokens: int = 4096,
        prefix_tokens: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        inline: bool = False,
    ) -> None:
        """Take a model and lay out the cache.

        Args:
            model: the decoder.
            tokenizer: of the same vocabulary; decodes, and names the ids that end a sequence.
            max_batch: slots: completions that run at the same time.
            max_length: tokens per slot, prompt and completion together. None: the model's positions, at most 2,048.
            prefill_tokens: prompt tokens read between two decoding steps; longer prompts are read in chunks.
            prefix_tokens: tokens of finished conversations whose cache is kept for a next turn; 0 keeps none. Kept
                prefixes save prefill, but a result may then differ in rounding with what the engine has seen before.
            dtype: sample from a copy of the weights in this type, refreshed by `update_weights`. None: share the
                module's own parameters, so that a change of them is seen at once.
            device: where the copy lives; None: where the model is. Another device than the model's implies a copy.
            seed: from which requests without a seed of their own draw theirs.
            inline: compute in the thread that asks, which waits, and its event loop with it; for training loops. A
                second thread that computes has an OpenMP pool of its own, and two pools on few cores slow each other.

        Raises:
            EngineError: a size is out of range.
        """
        config = model.config
        longest = min(config.max_positions, 2048) if max_length is None else max_length
        if not 2 <= longest <= config.max_positions:
            raise EngineError(
                f"max_length={longest} must be between 2 and the model's max_positions={config.max_positions}"
            )
        if max_batch < 1 or prefill_tokens < 1 or prefix_tokens < 0:
            raise EngineError(
                f"max_batch={max_batch} and prefill_tokens={prefill_tokens} must be at least 1, "
                f"prefix_tokens={prefix_tokens} at least 0"
            )
        weight = next(model.parameters())
        self._device = weight.device if device is None else torch.device(device)
        self._dtype = weight.dtype if dtype is None else dtype
        self._copies = dtype is not None or self._device != weight.device
        self.model = self._own_copy(model) if self._copies else model
        self.tokenizer = tokenizer
        self.max_batch, self.max_length, self.seed = max_batch, longest, seed
        self._stepper = Stepper(
            self.model,
            tokenizer,
            num_slots=max_batch,
            max_length=longest,
            prefill_tokens=prefill_tokens,
            prefix_tokens=prefix_tokens,
            shared=not self._copies,
        )
        self._changed = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._inline = inline
        self._closed = False
        self._num_requests = 0
        self._gathering: dict[asyncio.AbstractEventLoop, list[Generation]] = {}
        _open.add(self)

    # Sampling

    def generate(self, prompts: Sequence[str | Sequence[int]], sampling: Sampling) -> list[Completion]:
        """Sample after each prompt and wait.

        Args:
            prompts: texts (encoded without special tokens added) or token ids.
            sampling: for all of them. With a seed, prompt i draws from derive_seed(seed, "prompt", i).

        Returns:
            Prompt by prompt, the n siblings of one prompt in a row.

        Raises:
            EngineError: a prompt is empty, or prompt and max_tokens do not fit a slot.
        """
        requests = []
        for place, prompt in enumerate(prompts):
            tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            own = None if sampling.seed is None else derive_seed(sampling.seed, "prompt", place)
            requests.append(SampleRequest(prompt=tuple(tokens), sampling=sampling.replace(seed=own), id=str(place)))
        generations = [self._prepare(request) for request in requests]
        self._add(generations)
        return [completion for generation in generations for completion in generation.result()]

    async def sample(
        self, requests: Sequence[SampleRequest], *, timeout_s: float | None = None
    ) -> list[list[Completion]]:
        """For each request its completions, by index. See `SampleTokens`.

        Requests of all tasks that are ready in this turn of the event loop start together. After `timeout_s` what is
        unfinished ends as TIMEOUT. Cancelling the call withdraws its requests.

        Raises:
            EngineError: a prompt is empty, or prompt and max_tokens do not fit a slot.
        """
        generations = [self._prepare(request, timeout_s=timeout_s) for request in requests]
        loop = asyncio.get_running_loop()
        if loop not in self._gathering:
            self._gathering[loop] = []
            loop.call_soon(self._add_gathered, loop)
        self._gathering[loop].extend(generations)
        try:
            return [await generation.wait() for generation in generations]
        except BaseException:
            for generation in generations:
                generation.cancel()
            raise

    def submit(self, request: SampleRequest, *, streaming: bool = False, timeout_s: float | None = None) -> Generation:
        """Queue one request and return its handle: `result`, `wait`, `events` (if streaming), `cancel`."""
        generation = self._prepare(request, streaming=streaming, timeout_s=timeout_s)
        self._add([generation])
        return generation

    async def stream(
        self, request: SampleRequest, *, timeout_s: float | None = None
    ) -> AsyncGenerator[StreamEvent, None]:
        """Events of one request as they come; the last of each sibling carries its completion.

        Closing the iterator early withdraws the request.
        """
        generation = self.submit(request, streaming=True, timeout_s=timeout_s)
        async with contextlib.aclosing(generation.events()) as events:
            async for event in events:
                yield event

    # Weights

    def update_weights(self, source: Decoder | Mapping[str, Tensor] | None, version: int) -> None:
        """Sample from other weights, from the next step on; returns when they are in place.

        Running completions go on with the new weights over the keys and values of the old, and record both versions.
        Prompts that have not started are read again, kept prefixes are forgotten.

        Args:
            source: a decoder of the same shape; or tensors by parameter name (some or all), written into the
                engine's weights, which without `dtype` are the caller's own module; or None: the shared module was
                changed in place.
            version: what completions record as their weight version.

        Raises:
            EngineError: a name or shape is not the model's, or None was given to an engine that samples from a copy.
        """
        if source is None and self._copies:
            raise EngineError(
                "this engine samples from a copy of the weights: give update_weights the model or tensors"
            )
        done: Future[None] = Future()

        def swap() -> None:
            try:
                if isinstance(source, Decoder) and not self._copies:
                    self.model = source
                elif source is not None:
                    self._write(source)
                self._stepper.swap(self.model, version)
                done.set_result(None)
            except (EngineError, RuntimeError) as error:
                done.set_exception(error)

        self._post(swap)
        done.result()

    @property
    def weight_version(self) -> int:
        """Version of the weights that the next token is sampled from."""
        return self._stepper.version

    # Everything else

    def stats(self) -> EngineStats:
        """Counters and gauges at this moment."""
        stepper = self._stepper
        rows = stepper.rows
        return EngineStats(
            num_running=rows.num_running,
            num_waiting=len(stepper.waiting) + len(stepper.ready) + len(stepper.reader.long),
            num_slots=self.max_batch,
            prompt_tokens_total=stepper.num_prompt_tokens,
            prefill_tokens_total=stepper.reader.num_computed,
            generation_tokens_total=stepper.num_generated_tokens,
            kv_usage=rows.num_cached / (self.max_batch * self.max_length),
            prefix_hits=stepper.prefixes.num_hits,
            prefix_hit_tokens=stepper.prefixes.num_hit_tokens,
            num_steps=stepper.num_steps,
            weight_version=stepper.version,
        )

    def close(self) -> None:
        """Cancel what is unfinished and end the thread. The engine takes no requests afterwards."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            thread = self._thread
            self._changed.notify_all()
        if thread is not None and not self._inline:
            thread.join()
        while self._inbox:
            self._inbox.popleft()()
        self._end_all(StopReason.CANCELLED, "the engine was closed")

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The thread and its inbox

    def _prepare(
        self, request: SampleRequest, *, streaming: bool = False, timeout_s: float | None = None
    ) -> Generation:
        """Check a request, so that a wrong one is refused to its caller at once."""
        sampling = request.sampling
        name = f"request {request.id!r}" if request.id else "the request"
        vocab_size = self.model.config.vocab_size
        if not request.prompt:
            begin = self.model.config.bos_id
            if begin is None:
                raise EngineError(f"{name} has an empty prompt, and the model has no beginning-of-sequence token")
            request = request.replace(prompt=(begin,))
        if not 0 <= min(request.prompt) <= max(request.prompt) < vocab_size:
            raise EngineError(f"{name} has token ids outside 0 … {vocab_size - 1}: is this the model's tokenizer?")
        need = len(request.prompt) + sampling.max_tokens
        if need > self.max_length:
            raise EngineError(
                f"{name} needs {len(request.prompt)} prompt tokens + max_tokens={sampling.max_tokens} = {need}, more "
                f"than the {self.max_length} of a cache slot; lower max_tokens, shorten the prompt, or make the engine "
                f"with a larger max_length (the model knows {self.model.config.max_positions} positions)"
            )
        if sampling.seed is None:
            with self._changed:
                seed = derive_seed(self.seed, "request", self._num_requests)
                self._num_requests += 1
        else:
            seed = sampling.seed
        return Generation(request, seed=seed, streaming=streaming, timeout_s=timeout_s, cancel=self._withdraw)

    def _withdraw(self, generation: Generation) -> None:
        if not generation.done and not self._closed:
            self._post(lambda: self._stepper.withdraw(generation, StopReason.CANCELLED))

    def _add_gathered(self, loop: asyncio.AbstractEventLoop) -> None:
        generations = self._gathering.pop(loop)
        try:
            self._add(generations)
        except EngineError:  # closed since: nobody else would tell them
            for generation in generations:
                self._stepper.withdraw(generation, StopReason.CANCELLED, "the engine was closed")

    def _add(self, generations: Sequence[Generation]) -> None:
        def add() -> None:
            for generation in generations:
                self._stepper.add(generation)

        if generations:
            self._post(add)

    def _post(self, command: Callable[[], None]) -> None:
        """Have the thread run this between two steps."""
        with self._changed:
            if self._closed:
                raise EngineError("the engine is closed")
            self._inbox.append(command)
            drive = self._inline and self._thread is None
            if drive:
                self._thread = threading.current_thread()
            elif self._thread is None:
                self._thread = threading.Thread(target=self._run, name="posttrain-engine", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        if drive:
            try:
                self._run()
            finally:
                self._thread = None

    def _run(self) -> None:
        with torch.inference_mode():
            while self._next_commands():
                if self._stepper.busy:
                    try:
                        self._stepper.step()
                    except Exception as error:  # noqa: BLE001  whoever waits must be told, or waits for ever
                        self._end_all(StopReason.ERROR, f"the engine failed: {error!r}")

    def _end_all(self, reason: StopReason, error: str) -> None:
        """End every request, wherever it is."""
        for generation in self._stepper.in_flight():
            self._stepper.withdraw(generation, reason, error)

    def _next_commands(self) -> bool:
        """Run what is in the inbox, after waiting for work if there is none. False: the thread shall end."""
        with self._changed:
            if not self._inbox and not self._stepper.busy and not self._closed and not self._inline:
                self._changed.wait(_IDLE_S)
            if self._closed or (not self._inbox and not self._stepper.busy):
                self._thread = None
                return False
            commands = list(self._inbox)
            self._inbox.clear()
        for command in commands:
            command()
        return True

    # The engine's own weights

    def _own_copy(self, model: Decoder) -> Decoder:
        with torch.no_grad():
            return copy.deepcopy(model).cast(self._dtype).to(self._device).requires_grad_(False)

    def _write(self, source: Decoder | Mapping[str, Tensor]) -> None:
        """Copy weights into the engine's own tensors, so that their addresses stay."""
        tensors = dict(source.named_parameters()) if isinstance(source, Decoder) else dict(source)
        ours = dict(self.model.named_parameters())
        unknown = sorted(set(tensors) - set(ours))
        if isinstance(source, Decoder) and (unknown or set(ours) - set(tensors)):
            self.model = self._own_copy(source)
            return
        if unknown:
            raise EngineError(
                f"update_weights: the model has no parameter {unknown[0]!r} ({len(unknown)} unknown names)"
            )
        wrong = [name for name, tensor in tensors.items() if tensor.shape != ours[name].shape]
        if wrong:
            name = wrong[0]
            raise EngineError(
                f"update_weights: {name!r} has shape {tuple(tensors[name].shape)}, "
                f"the model's has {tuple(ours[name].shape)}"
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                ours[name].copy_(tensor)
