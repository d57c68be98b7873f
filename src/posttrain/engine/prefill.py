"""Reading prompts: their keys and values, and the logits of the token that follows.

N prompts, T tokens, V vocabulary, D width, L layers, J key–value heads, M capacity, K head width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain.engine.attention import ContinuedPrompts, WholePrompts
from posttrain.engine.blocks import BlockShape, KeyStore, places_of
from posttrain.engine.cache import PromptCache
from posttrain.engine.compiled import CompiledDecoder
from posttrain.engine.generation import Generation
from posttrain.engine.prefixes import PrefixStore
from posttrain.models import Decoder

Ints = NDArray[np.int64]


@dataclass(kw_only=True)
class ReadPrompt:
    """A prompt whose siblings can start."""

    generation: Generation
    cache: PromptCache | KeyStore
    row: int  # of `cache`
    logits_V: Tensor

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.generation.request.prompt)

    def detach(self) -> None:
        """Keep this prompt's part of a shared cache only."""
        if isinstance(self.cache, PromptCache) and self.cache.num_rows > 1:
            self.cache, self.row = self.cache.row(self.row, self.length), 0


@dataclass(kw_only=True)
class _LongPrompt:
    generation: Generation
    cache: PromptCache | KeyStore
    num_read: int


class PromptReader:
    """Runs the decoder over prompts. A prompt longer than the budget of one iteration is read in chunks."""

    def __init__(
        self, model: Decoder, prefixes: PrefixStore, budget: int, compiled: CompiledDecoder | None = None
    ) -> None:
        """Take the most tokens that one iteration reads, and the compiled pass where there is one for this model."""
        self.model = model
        self.compiled = compiled
        self.prefixes = prefixes
        self.budget = budget
        self.long: deque[_LongPrompt] = deque()
        self.num_computed = 0  # prompt tokens run through the decoder, without padding

    def read(self, generations: Sequence[Generation]) -> list[ReadPrompt]:
        """Read whole prompts, those of similar length together. Results come in the order of the arguments."""
        if self.compiled is not None:
            return self._read_compiled(self.compiled, generations)
        fresh: dict[int, list[Generation]] = {}
        continued: list[tuple[Generation, PromptCache, int]] = []
        for generation in generations:
            found = self.prefixes.longest(generation.request.prompt)
            if found is not None and isinstance(found[0], PromptCache):
                continued.append((generation, found[0], found[1]))
            else:
                fresh.setdefault((len(generation.request.prompt) - 1).bit_length(), []).append(generation)
        done: dict[int, ReadPrompt] = {}
        for batch in fresh.values():
            for prompt in self._read_fresh(batch):
                done[id(prompt.generation)] = prompt
        if continued:
            for prompt in self._read_continued(continued):
                done[id(prompt.generation)] = prompt
        return [done[id(generation)] for generation in generations]

    def begin(self, generation: Generation) -> None:
        """Take on a prompt that is longer than the budget."""
        prompt = generation.request.prompt
        cache, num_read = self._begun(prompt) if self.compiled is not None else self._begun_plainly(prompt)
        self.long.append(_LongPrompt(generation=generation, cache=cache, num_read=num_read))

    def advance(self, budget: int) -> ReadPrompt | None:
        """Read the next chunk of the oldest long prompt; the prompt, if that was its last."""
        prompt = self.long[0]
        tokens = prompt.generation.request.prompt
        chunk = tokens[prompt.num_read : prompt.num_read + budget]
        last = prompt.num_read + len(chunk) == len(tokens)
        if self.compiled is not None and isinstance(prompt.cache, KeyStore):
            logits_NV = self._run_compiled(self.compiled, [prompt.cache], [prompt.num_read], [chunk], last)
        else:
            assert isinstance(prompt.cache, PromptCache)
            logits_NV = self._continue(prompt.cache, np.array([prompt.num_read]), [chunk], logits=last)
        prompt.num_read += len(chunk)
        if logits_NV is None:
            return None
        self.long.popleft()
        return ReadPrompt(generation=prompt.generation, cache=prompt.cache, row=0, logits_V=logits_NV[0])

    def _read_fresh(self, batch: list[Generation]) -> list[ReadPrompt]:
        prompts = [generation.request.prompt for generation in batch]
        cache = PromptCache(self.model.config.num_layers, len(batch))
        tokens_NT = self._pad(prompts)
        hidden_NTD = self.model.hidden(tokens_NT, attend=WholePrompts(cache))
        self.num_computed += sum(map(len, prompts))
        return _ready(batch, cache, self._last_logits(hidden_NTD, prompts))

    def _read_continued(self, found: list[tuple[Generation, PromptCache, int]]) -> list[ReadPrompt]:
        batch = [generation for generation, _, _ in found]
        starts = np.array([length for _, _, length in found])
        rests = [generation.request.prompt[length:] for generation, _, length in found]
        cache = self._empty(len(found), int(starts.max()) + max(map(len, rests)))
        for row, (_, prefix, length) in enumerate(found):
            _copy(prefix, cache, row, length)
        return _ready(batch, cache, self._continue(cache, starts, rests))

    def _continue(
        self, cache: PromptCache, starts: Ints, rests: Sequence[Sequence[int]], *, logits: bool = True
    ) -> Tensor | None:
        """Read the rests of prompts whose first tokens are cached; what follows each, NV, where it is asked for."""
        self.num_computed += sum(map(len, rests))
        tokens_NT = self._pad(rests)
        num_tokens = tokens_NT.shape[1]
        attend = ContinuedPrompts(cache, starts, num_tokens, tokens_NT.device)
        # Padding may stand past the last position that the model knows; its result is never read.
        positions = np.minimum(starts[:, None] + np.arange(num_tokens), self.model.config.max_positions - 1)
        positions_NT = torch.from_numpy(positions).to(tokens_NT.device)
        hidden_NTD = self.model.hidden(tokens_NT, positions_BT=positions_NT, attend=attend)
        return self._last_logits(hidden_NTD, rests) if logits else None

    def _read_compiled(self, compiled: CompiledDecoder, generations: Sequence[Generation]) -> list[ReadPrompt]:
        prompts = [generation.request.prompt for generation in generations]
        stores, starts = zip(*(self._begun(prompt) for prompt in prompts), strict=True)
        rests = [prompt[start:] for prompt, start in zip(prompts, starts, strict=True)]
        logits_NV = self._run_compiled(compiled, stores, starts, rests, logits=True)
        assert logits_NV is not None
        return [
            ReadPrompt(generation=generation, cache=store, row=0, logits_V=logits_V)
            for generation, store, logits_V in zip(generations, stores, logits_NV.unbind(), strict=True)
        ]

    def _run_compiled(
        self,
        compiled: CompiledDecoder,
        stores: Sequence[KeyStore],
        starts: Sequence[int],
        rests: Sequence[Sequence[int]],
        logits: bool,
    ) -> Tensor | None:
        """Read the rests of prompts whose first `starts` tokens are in their stores."""
        lengths = np.array([len(rest) for rest in rests])
        ends = np.cumsum(lengths)
        self.num_computed += int(ends[-1])
        sequences = np.concatenate(([0], ends))
        outputs = np.full(ends[-1], -1)
        if logits:
            outputs[ends - 1] = np.arange(len(rests))
        result = compiled.forward(
            places_of(stores),
            np.fromiter((token for rest in rests for token in rest), np.int64, ends[-1]),
            np.repeat(np.arange(len(rests)), lengths),
            np.arange(ends[-1]) - np.repeat(sequences[:-1] - np.array(starts), lengths),
            sequences=sequences,
            outputs_N=outputs,
        )
        return result if logits else None

    def _begun(self, prompt: Sequence[int]) -> tuple[KeyStore, int]:
        """A store for a prompt, and how many of its tokens a kept conversation has put in."""
        store = KeyStore(BlockShape.of(self.model.config), len(prompt))
        found = self.prefixes.longest(prompt)
        if found is None or not isinstance(found[0], KeyStore):
            return store, 0
        store.take(found[0], found[1])
        return store, found[1]

    def _begun_plainly(self, prompt: Sequence[int]) -> tuple[PromptCache, int]:
        cache = self._empty(1, len(prompt))
        found = self.prefixes.longest(prompt)
        if found is None or not isinstance(found[0], PromptCache):
            return cache, 0
        _copy(found[0], cache, 0, found[1])
        return cache, found[1]

    def _last_logits(self, hidden_NTD: Tensor, prompts: Sequence[Sequence[int]]) -> Tensor:
        # Logits of the last position only: a prompt's other logits would cost V × T for nothing.
        rows = torch.arange(len(prompts), device=hidden_NTD.device)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=hidden_NTD.device)
        return self.model.logits(hidden_NTD[rows, last])

    def _pad(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Token ids NT, padded on the right: under a causal mask nothing real sees what stands after it.

        The pad is the prompt's own last token, so that a NaN in some other token's embedding does not come in.
        """
        tokens = np.zeros((len(prompts), max(map(len, prompts))), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
            tokens[row, len(prompt) :] = prompt[-1]
        return torch.from_numpy(tokens).to(self._device())

    def _empty(self, num_rows: int, length: int) -> PromptCache:
        config = self.model.config
        cache = PromptCache(config.num_layers, num_rows)
        shape = (num_rows, config.num_kv_heads, length, config.head_dim)
        for layer in range(config.num_layers):
            keys, values = (torch.zeros(shape, dtype=self._dtype(), device=self._device()) for _ in range(2))
            cache.put(layer, keys, values)
        return cache

    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def _ready(batch: list[Generation], cache: PromptCache, logits_NV: Tensor | None) -> list[ReadPrompt]:
    assert logits_NV is not None
    return [
        ReadPrompt(generation=generation, cache=cache, row=row, logits_V=logits_NV[row])
        for row, generation in enumerate(batch)
    ]


def _copy(source: PromptCache, target: PromptCache, row: int, length: int) -> None:
    """Copy the one row of `source` into a row of `target`."""
    for ours, theirs in ((source.keys, target.keys), (source.values, target.values)):
        for old_NJMK, new_NJMK in zip(ours, theirs, strict=True):
            new_NJMK[row, :, :length].copy_(old_NJMK[0, :, :length])
