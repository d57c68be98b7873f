"""Tiny policies, one thread, and a workbench in a temporary folder for the tests of the recipes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from posttrain.core import StopReason, Task, Trajectory
from posttrain.recipes.policy import Policy
from posttrain.recipes.pretrain import new_policy
from posttrain.recipes.workbench import Workbench, open_workbench
from posttrain.rollout import Group


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The machine may be shared, and one thread is enough for tiny matrices."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Workbench]:
    with open_workbench("toy", {}, runs=tmp_path / "runs") as opened:
        yield opened


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """Random weights over bytes and a few specials; nobody trains it in place."""
    return make_policy(tmp_path_factory.mktemp("tiny") / "model")


def make_policy(path: Path, seed: int = 0) -> Policy:
    return new_policy(
        ["to be or not to be"],
        vocab_size=262,
        width=32,
        num_layers=1,
        num_heads=2,
        max_positions=64,
        seed=seed,
        path=path,
    )


@pytest.fixture
def make_group():
    """A function that makes a group of two-token answers; None makes a sibling whose rollout failed."""

    def make(task_id: str, texts: list[str | None]) -> Group:
        task = Task(id=task_id, prompt="?", answer="yes")
        siblings = [
            Trajectory(
                id=f"{task_id}/0/{index}",
                task=task,
                tokens=(5,) if text is None else (5, 6, 7),
                mask=(False,) if text is None else (False, True, True),
                logprobs=(0.0,) if text is None else (0.0, -1.0, -2.0),
                policy_logprobs=(0.0,) if text is None else (0.0, -1.0, -2.0),
                text=text or "",
                stop_reason=StopReason.ERROR if text is None else StopReason.EOS,
                error="lost" if text is None else None,
                group=f"{task_id}/0",
                index=index,
            )
            for index, text in enumerate(texts)
        ]
        return Group(task=task, trajectories=tuple(siblings))

    return make
