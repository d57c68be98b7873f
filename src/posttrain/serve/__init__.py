"""serve: an OpenAI-compatible API over models, with a log of every answer.

Takes served models (an engine, a renderer, the card's id) and a store for interactions and feedback; gives an ASGI
application and a server. May import: core, data, render, models, registry, engine; the store comes as an argument.
Needs the extra `serve` (starlette, uvicorn) from `create_app` on; naming the records and Protocols does not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from posttrain.core import MissingExtraError
from posttrain.serve.model import (
    InteractionStore,
    ModelSource,
    ModelTable,
    ParsesAnswers,
    PromptRenderer,
    ServedModel,
    StreamEvent,
    StreamTokens,
    SwapsModels,
    WholeAnswers,
)

if TYPE_CHECKING:
    from posttrain.serve.app import create_app
    from posttrain.serve.server import Server, run
    from posttrain.serve.state import ServeSettings

_LATER = {
    "Server": "posttrain.serve.server",
    "ServeSettings": "posttrain.serve.state",
    "create_app": "posttrain.serve.app",
    "run": "posttrain.serve.server",
}

__all__ = [
    "InteractionStore",
    "ModelSource",
    "ModelTable",
    "ParsesAnswers",
    "PromptRenderer",
    "ServeSettings",
    "ServedModel",
    "Server",
    "StreamEvent",
    "StreamTokens",
    "SwapsModels",
    "WholeAnswers",
    "create_app",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'posttrain.serve' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_LATER[name]), name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("starlette", "uvicorn"):
            raise MissingExtraError(package, "serve", f"serve.{name}") from error
        raise


def __dir__() -> list[str]:
    return sorted(__all__)
