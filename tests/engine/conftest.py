"""A byte tokenizer, a tiny decoder, and engines over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from posttrain import models
from posttrain.engine import LocalEngine


class ByteTokenizer:
    """Token i is byte i; 256 ends a sequence, 257 is another special token, written "<x>"."""

    vocab_size = 258
    eos_ids = frozenset({256})

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        parts = text.split("<x>")
        ids = list(parts[0].encode())
        for part in parts[1:]:
            ids += [257, *part.encode()]
        return ids

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text, run = "", bytearray()
        for token in tokens:
            if token < 256:
                run.append(token)
            elif not skip_special_tokens:
                text += run.decode("utf-8", "replace") + ("<x>" if token == 257 else "<eos>")
                run.clear()
        return text + run.decode("utf-8", "replace")


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def make_model() -> Callable[..., models.Decoder]:
    def make(seed: int = 0, **changes: Any) -> models.Decoder:
        shape: dict[str, Any] = {
            "vocab_size": 258,
            "width": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 8,
            "mlp_width": 64,
            "max_positions": 256,
            "init_std": 0.25,
        }
        return models.Decoder.random(models.DecoderConfig(**{**shape, **changes}), seed)

    return make


@pytest.fixture
def model(make_model: Callable[..., models.Decoder]) -> models.Decoder:
    return make_model(0)


@pytest.fixture
def make_engine(model: models.Decoder, tokenizer: ByteTokenizer) -> Iterator[Callable[..., LocalEngine]]:
    engines: list[LocalEngine] = []

    def make(other: models.Decoder | None = None, **options: Any) -> LocalEngine:
        engines.append(LocalEngine(other or model, tokenizer, **{"max_batch": 8, **options}))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
