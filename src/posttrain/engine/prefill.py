"""Reading prompts: their keys and values, and the logits of the token that follows.

N prompts, T tokens, V vocabulary, D width, L layers, J key–value heads, M capacity, K head width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from posttrain.engine.attention import ContinuedPrompts, WholePrompts
from posttrain.engine.cache import PromptCache
from posttrain.engine.generation import Generation
from posttrain.engine.prefixes import PrefixStore
from posttrain.models import Decoder


@dataclass(kw_only=True)
class ReadPrompt:
    """A prompt whose siblings can start."""

    generation: Generation
    cache: PromptCache
    row: int  # of `cache`
    logits_V: Tensor

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.generation.request.prompt)

    def detach(self) -> None:
        """Keep this prompt's part of a shared cache only."""
        if self.cache.num_rows > 1:
            self.cache, self.row = self.cache.row(self.row, self.length), 0


@dataclass(kw_only=True)
class _LongPrompt:
    generation: Generation
    cache: PromptCache
    num_read: int


class PromptReader:
    """Runs the decoder over prompts. A prompt longer than the budget of one iteration is read in chunks."""

    def __init__(self, model: Decoder, prefixes: PrefixStore, budget: int) -> None:
        """Take the most tokens that one iteration reads."""
        self.model = model
        self.prefixes = prefixes
        self.budget = budget
        self.long: deque[_LongPrompt] = deque()
        self.num_computed = 0  # prompt tokens run through the decoder, without padding

    def read(self, generations: Sequence[Generation]) -> list[ReadPrompt]:
        """Read whole prompts, those of similar length together. Results come in the order of the arguments."""
        fresh: dict[int, list[Generation]] = {}
        continued: list[tuple[Generation, PromptCache, int]] = []
        for generation in generations:
            found = self.prefixes.longest(generation.request.prompt)
            if found is not None:
                continued.append((generation, *found))
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
        cache = self._empty(1, len(prompt))
        num_read = 0
        if (found := self.prefixes.longest(prompt)) is not None:
            _copy(found[0], cache, 0, found[1])
            num_read = found[1]
        self.long.append(_LongPrompt(generation=generation, cache=cache, num_read=num_read))

    def advance(self, budget: int) -> ReadPrompt | None:
        """Read the next chunk of the oldest long prompt; the prompt, if that was its last."""
        prompt = self.long[0]
        tokens = prompt.generation.request.prompt
        chunk = tokens[prompt.num_read : prompt.num_read + budget]
        hidden = self._continue(prompt.cache, np.array([prompt.num_read]), [chunk])
        prompt.num_read += len(chunk)
        if prompt.num_read < len(tokens):
            return None
        self.long.popleft()
        logits_V = self.model.logits(hidden[0, len(chunk) - 1 : len(chunk)])[0]
        return ReadPrompt(generation=prompt.generation, cache=prompt.cache, row=0, logits_V=logits_V)

    def _read_fresh(self, batch: list[Generation]) -> list[ReadPrompt]:
        prompts = [generation.request.prompt for generation in batch]
        cache = PromptCache(self.model.config.num_layers, len(batch))
        tokens_NT = self._pad(prompts)
        hidden_NTD = self.model.hidden(tokens_NT, attend=WholePrompts(cache))
        self.num_computed += sum(map(len, prompts))
        return self._finish(batch, cache, hidden_NTD, [len(prompt) - 1 for prompt in prompts])

    def _read_continued(self, found: list[tuple[Generation, PromptCache, int]]) -> list[ReadPrompt]:
        batch = [generation for generation, _, _ in found]
        starts = np.array([length for _, _, length in found])
        rests = [generation.request.prompt[length:] for generation, _, length in found]
        cache = self._empty(len(found), int(starts.max()) + max(map(len, rests)))
        for row, (_, prefix, length) in enumerate(found):
            _copy(prefix, cache, row, length)
        hidden_NTD = self._continue(cache, starts, rests)
        return self._finish(batch, cache, hidden_NTD, [len(rest) - 1 for rest in rests])

    def _continue(self, cache: PromptCache, starts: np.ndarray, rests: Sequence[Sequence[int]]) -> Tensor:
        tokens_NT = self._pad(rests)
        num_tokens = tokens_NT.shape[1]
        attend = ContinuedPrompts(cache, starts, num_tokens, tokens_NT.device)
        # Padding may stand past the last position that the model knows; its result is never read.
        positions = np.minimum(starts[:, None] + np.arange(num_tokens), self.model.config.max_positions - 1)
        positions_NT = torch.from_numpy(positions).to(tokens_NT.device)
        self.num_computed += sum(map(len, rests))
        return self.model.hidden(tokens_NT, positions_BT=positions_NT, attend=attend)

    def _finish(
        self, batch: list[Generation], cache: PromptCache, hidden_NTD: Tensor, last: list[int]
    ) -> list[ReadPrompt]:
        # Logits of the last position only: a prompt's other logits would cost V × T for nothing.
        rows = torch.arange(len(batch), device=hidden_NTD.device)
        logits_NV = self.model.logits(hidden_NTD[rows, torch.tensor(last, device=hidden_NTD.device)])
        return [
            ReadPrompt(generation=generation, cache=cache, row=row, logits_V=logits_NV[row])
            for row, generation in enumerate(batch)
        ]

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


def _copy(source: PromptCache, target: PromptCache, row: int, length: int) -> None:
    """Copy the one row of `source` into a row of `target`."""
    for ours, theirs in ((source.keys, target.keys), (source.values, target.values)):
        for old_NJMK, new_NJMK in zip(ours, theirs, strict=True):
            new_NJMK[row, :, :length].copy_(old_NJMK[0, :, :length])
