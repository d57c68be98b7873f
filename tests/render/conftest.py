"""Fixtures of the render tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.render import Tokenizer

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    'A tool call is {"name": "add", "arguments": {"a": 1, "b": 22}} and nothing else.',
    "Grüße aus Köln! 你好，世界。 Привет, мир. 🙂🙃",
] * 4


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real tokenizers and templates; tests that need it are skipped where it is absent."""
    if not (DATA / "tokenizers").exists():
        pytest.skip(f"no data at {DATA}")
    return DATA


@pytest.fixture(scope="session")
def small() -> Tokenizer:
    """A small byte-level tokenizer with the built-in ChatML template."""
    return Tokenizer.train_bpe(CORPUS, 400)
