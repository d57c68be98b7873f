"""GET /admin/models and POST /admin/models/{name}/swap. The admin key is checked before they are reached."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from posttrain.core import PosttrainError
from posttrain.serve.api_error import ApiError, json_response
from posttrain.serve.body import read_body
from posttrain.serve.model import ServedModel, SwapsModels, engine_stats
from posttrain.serve.state import ServeState
from posttrain.serve.wire import SwapRequest, parse_body

logger = logging.getLogger(__name__)


def model_dict(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.created_s),
        "owned_by": "posttrain",
        "card_id": model.card_id or None,
        "max_model_len": model.context,
    }


async def admin_models(request: Request) -> Response:
    """What is served, with the engines' own figures."""
    state: ServeState = request.app.state.serve
    models = state.source.models()
    rows = [{**model_dict(model), "engine": engine_stats(model.engine)} for model in models.values()]
    return json_response({"object": "list", "data": rows})


async def admin_swap(request: Request) -> Response:
    """Have the source serve another card under a name. Requests in work end with the model they began with."""
    state: ServeState = request.app.state.serve
    name = request.path_params["name"]
    state.model(name)
    if not isinstance(state.source, SwapsModels):
        raise ApiError(404, "this server's models are fixed; start it with a source that can swap", code="fixed_models")
    wire, _ = parse_body(await read_body(request, state.settings) or b"{}", SwapRequest)
    try:
        model = await asyncio.to_thread(state.source.swap, name, wire.card_id)
    except PosttrainError as error:
        raise ApiError(409, f"the model {name!r} stays as it is: {error}", code="swap_refused") from None
    logger.info("model %s is now %s", name, model.model_id)
    return json_response(model_dict(model))
