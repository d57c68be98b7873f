"""What the journeys share: one thread, real data where it is, and a toy task that a tiny decoder learns in seconds.

The toy: a word of three letters, to be written backwards with each letter moved on by one ("abj" → "acb").
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from posttrain.core import Task

LETTERS = "abcdefghij"
DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The machine may be shared, and one thread is enough for tiny matrices."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def toy_tasks() -> list[Task]:
    """All thousand words, in an order of their own."""
    words = ["".join(letters) for letters in itertools.product(LETTERS, repeat=3)]
    random.Random(0).shuffle(words)
    return [Task(id=word, prompt=f"{word}>", answer=_turned(word)) for word in words]


def _turned(word: str) -> str:
    return "".join(LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)] for letter in reversed(word))


@pytest.fixture
def real_data() -> Path:
    """The folder of public data sets beside the repository; journeys that need it are skipped without it."""
    if not (DATA / "README.md").is_file():
        pytest.skip("no shared/data beside the repository: public data sets are not there")
    return DATA
