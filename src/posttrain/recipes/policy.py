"""A policy as recipes hold it: the decoder, its tokenizer and its chat template, from one folder and back to one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from posttrain import models
from posttrain.core import ModelError, Task
from posttrain.engine import LocalEngine
from posttrain.render import Renderer, Tokenizer


@dataclass(frozen=True)
class Policy:
    """What is trained, sampled and served. A model with adapters is sampled with them, and saved with them merged."""

    model: models.Decoder
    tokenizer: Tokenizer
    renderer: Renderer
    path: Path
    base: Path | None = None  # the folder whose weights the adapters are on, or would be; None: there is none
    fresh_adapters: bool = False  # without them the model is what was loaded

    def engine(
        self,
        *,
        slots: int = 64,
        length: int | None = None,
        dtype: str = "float32",
        seed: int = 0,
        inline: bool = False,
    ) -> LocalEngine:
        """A sampler of this policy. In float32 it shares the weights; in another dtype it samples from a copy.

        Args:
            slots: answers sampled at the same time; each takes `length` tokens of cache.
            length: tokens of prompt and answer together, at most; None: what the model is made for, at most 2,048.
            dtype: "float32", "bfloat16" or "float16".
            seed: for requests without one of their own.
            inline: sample in the thread that asks; for training loops.
        """
        kind = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
        return LocalEngine(
            self.model, self.tokenizer, max_batch=slots, max_length=length, dtype=kind, seed=seed, inline=inline
        )

    def length_for(self, tasks: Iterable[Task], max_tokens: int) -> int:
        """Tokens that the longest prompt and its answer need, as far as the model has positions for them."""
        longest = max(len(prompt) for prompt in self.renderer.prompt_many([task.prompt for task in tasks]))
        return min(longest + max_tokens, self.model.config.max_positions)

    def save(self, folder: Path) -> Path:
        """Write a Hugging Face folder that `transformers` loads; adapters are merged into it."""
        models.save(self.model, folder, tokenizer=self.tokenizer)
        return folder


def load_policy(
    name_or_path: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    template: Path | None = None,
    adapter: Path | None = None,
) -> Policy:
    """Load a policy from a local folder or a Hugging Face name.

    Args:
        name_or_path: folder with config.json, safetensors and tokenizer.json, or "owner/name" (needs a network); or a
            folder of adapters in PEFT's format, which names its base.
        device: "cpu", "cuda", "cuda:0" …
        dtype: of the weights; the optimiser's master weights are float32 in any case.
        template: a chat template file that replaces the folder's own.
        adapter: a folder of adapters to put on the model, whatever base it names.

    Raises:
        ModelError: the folder lacks something, the adapters do not fit, or the tokenizer knows more ids than the model
            has rows.
    """
    folder = models.resolve(name_or_path)
    base = folder
    if models.is_adapter_folder(folder):
        if adapter is not None:
            raise ModelError(f"{folder}: holds adapters, and another adapter is given: {adapter}. Give the base model")
        adapter = folder
        base = models.resolve(models.base_of(folder))
    model = models.load(base, dtype=dtype, device=device)
    if adapter is not None:
        models.load_adapters(model, adapter)
    source = adapter if adapter is not None and (adapter / "tokenizer.json").exists() else base
    tokenizer = Tokenizer.from_folder(source)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ModelError(
            f"{source}: the tokenizer gives ids up to {tokenizer.vocab_size - 1}, "
            f"the model has embeddings for {model.config.vocab_size}"
        )
    text = template.read_text(encoding="utf-8") if template else None
    return Policy(model, tokenizer, Renderer(tokenizer, text), adapter or folder, base)
