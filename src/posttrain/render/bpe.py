"""Learn a byte-level BPE vocabulary from texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from posttrain.core import RenderError

# How GPT-4's and Qwen's tokenizers cut a text before merging: contractions, words with one leading mark or space,
# single digits, punctuation with its line ends, runs of white space. Single digits make arithmetic learnable.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str]) -> str:
    """The text of a tokenizer.json: special tokens first, then the 256 bytes, then the merges learnt.

    No normaliser: every text decodes to itself. The result depends on nothing but the arguments.

    Raises:
        RenderError: no room for the special tokens and the bytes, or a special token is empty or given twice.
    """
    if len(set(special_tokens)) != len(special_tokens) or not special_tokens or not all(special_tokens):
        raise RenderError(f"special tokens must be one or more different, non-empty texts, not {list(special_tokens)}")
    if vocab_size < 256 + len(special_tokens):
        raise RenderError(
            f"vocab_size {vocab_size} has no room for 256 bytes and {len(special_tokens)} special tokens; "
            f"give at least {256 + len(special_tokens)}"
        )
    backend: Any = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    definition: str = backend.to_str()
    return definition
