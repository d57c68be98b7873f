"""posttrain: the open flywheel that evaluates, tunes and serves language models.

    import posttrain as pt

Rooms load when they are first named, so `import posttrain` is quick and loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from posttrain.core import (
    Completion,
    Example,
    Grade,
    Message,
    PosttrainError,
    Sampling,
    StopReason,
    Task,
    Trajectory,
    recipe,
)

if TYPE_CHECKING:
    from posttrain import (
        core,
        data,
        engine,
        evaluate,
        feedback,
        grade,
        models,
        objectives,
        recipes,
        registry,
        render,
        rollout,
        serve,
        train,
    )

__version__ = "0.1.0"

_ROOMS = frozenset(
    "core data engine evaluate feedback grade models objectives recipes registry render rollout serve train".split()
)

__all__ = [
    "Completion",
    "Example",
    "Grade",
    "Message",
    "PosttrainError",
    "Sampling",
    "StopReason",
    "Task",
    "Trajectory",
    "__version__",
    "core",
    "data",
    "engine",
    "evaluate",
    "feedback",
    "grade",
    "models",
    "objectives",
    "recipe",
    "recipes",
    "registry",
    "render",
    "rollout",
    "serve",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"posttrain.{name}")
    raise AttributeError(f"module 'posttrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
