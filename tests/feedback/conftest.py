"""A store, and short ways to write interactions and signals."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain.core import Feedback, Interaction, Sampling, StopReason, user
from posttrain.feedback import FeedbackStore


def answer(id: str, choice: int = 0, **change: Any) -> Interaction:
    """An interaction whose prompt is `q <id>` and whose text is `<id>.<choice>`."""
    values: dict[str, Any] = {
        "id": id,
        "choice": choice,
        "model": "card",
        "model_name": "tiny",
        "messages": (user(f"q {id}"),),
        "prompt": f"<user>q {id}",
        "prompt_tokens": tuple(id.encode()),
        "tokens": (1, 2, 3),
        "logprobs": (-0.5, -0.25, -0.125),
        "text": f"{id}.{choice}",
        "stop_reason": StopReason.EOS,
        "sampling": Sampling(),
        "created_s": 100.0,
    }
    return Interaction(**{**values, **change})


@pytest.fixture(scope="session")
def make() -> Callable[..., Interaction]:
    return answer


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeedbackStore]:
    with FeedbackStore(tmp_path / "store.db") as opened:
        yield opened


@pytest.fixture
def served(store: FeedbackStore) -> Callable[..., Interaction]:
    def log(id: str, choice: int = 0, **change: Any) -> Interaction:
        interaction = answer(id, choice, **change)
        store.log(interaction)
        return interaction

    return log


@pytest.fixture
def say(store: FeedbackStore) -> Callable[..., Feedback]:
    numbers = itertools.count(1)

    def add(about: str, kind: str, value: Any = None, source: str = "ann", choice: int = 0, **more: Any) -> Feedback:
        number = next(numbers)
        values = {"id": f"f{number}", "created_s": float(number), **more}
        feedback = Feedback(completion_id=about, choice=choice, kind=kind, value=value, source=source, **values)
        store.add(feedback)
        return feedback

    return add
