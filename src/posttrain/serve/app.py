"""The application: routes, keys, request ids, errors."""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from posttrain.serve.admin_routes import admin_models, admin_swap, model_dict
from posttrain.serve.answer import Answer
from posttrain.serve.api_error import ApiError, json_response
from posttrain.serve.body import read_body
from posttrain.serve.feedback_routes import add_feedback, list_feedback
from posttrain.serve.job import chat_job, text_job
from posttrain.serve.model import InteractionStore, ModelSource, ModelTable, ServedModel
from posttrain.serve.state import Keys, ServeSettings, ServeState
from posttrain.serve.wire import ChatRequest, CompletionRequest, parse_body

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset(("/health", "/ready", "/metrics"))  # everything else needs a key, known path or not


def create_app(
    models: Mapping[str, ServedModel] | ModelSource,
    *,
    store: InteractionStore | None = None,
    api_keys: Collection[str] = (),
    admin_keys: Collection[str] = (),
    settings: ServeSettings | None = None,
    **limits: Any,
) -> Starlette:
    """An OpenAI-compatible API over some models.

    Args:
        models: served models by name, or an object that says which are served now.
        store: keeps every answer and the feedback about it; None keeps nothing.
        api_keys: `Authorization: Bearer <key>` must carry one of them on every path but /health, /ready and /metrics.
            Without any, the API is open: bind it to the loopback address only.
        admin_keys: open /admin, and nothing else does; without any, /admin is closed. They open /v1 too.
        settings: limits, or name them one by one: `max_body_bytes=…`, `request_timeout_s=…`.

    Raises:
        ServeError: a key is empty.
        ConfigError: a limit is unknown or out of range.
    """
    if isinstance(models, Mapping):
        models = ModelTable(_named(models))
    settings = (settings or ServeSettings()).replace(**limits)
    state = ServeState(models, store, settings, Keys(api_keys), Keys(admin_keys))
    routes = [
        Route("/health", _health),
        Route("/ready", _ready),
        Route("/metrics", _metrics),
        Route("/v1/models", _list_models),
        Route("/v1/models/{name:path}", _show_model),
        Route("/v1/chat/completions", _chat, methods=["POST"]),
        Route("/v1/completions", _text, methods=["POST"]),
        Route("/v1/feedback", add_feedback, methods=["POST"]),
        Route("/v1/feedback/{completion_id}", list_feedback),
        Route("/admin/models", admin_models),
        Route("/admin/models/{name:path}/swap", admin_swap, methods=["POST"]),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(RequestFrame, state=state), Middleware(RequireKey, state=state)],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error},
        lifespan=_lifespan,
    )
    app.router.redirect_slashes = False
    app.state.serve = state
    return app


def _named(models: Mapping[str, ServedModel]) -> list[ServedModel]:
    return [model if model.name == name else replace(model, name=name) for name, model in models.items()]


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    yield
    state: ServeState = app.state.serve
    state.draining = True
    await state.idle()


class RequestFrame:
    """Outermost: gives every answer its request id, counts it, and turns what nobody caught into a bare 500."""

    def __init__(self, app: ASGIApp, state: ServeState) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def framed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode("ascii"))]
            await send(message)

        try:
            await self._app(scope, receive, framed)
        except Exception:
            logger.exception("request %s %s failed", request_id, scope["path"])
            if status:
                raise  # the answer has begun: only breaking the connection tells that it is not complete
            await ApiError(500, f"internal error; the server's log has the cause under {request_id}").response()(
                scope, receive, framed
            )
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._state.metrics.count("http_responses_total", path=route, status=str(status))


def _request_id(scope: Scope) -> str:
    given = dict(scope["headers"]).get(b"x-request-id", b"")
    if 0 < len(given) <= 128 and all(0x21 <= byte <= 0x7E for byte in given):
        return str(given.decode("ascii"))
    return uuid.uuid4().hex


class RequireKey:
    """Closed by default: every path that is not listed as open needs a key."""

    def __init__(self, app: ASGIApp, state: ServeState) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or refuse it."""
        if scope["type"] == "http":
            refusal = self._check(scope)
            if refusal is not None:
                await refusal.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> ApiError | None:
        path = scope["path"]
        if path in OPEN_PATHS:
            return None
        header = dict(scope["headers"]).get(b"authorization")
        admin = self._state.admin_keys.fingerprint(header)
        state = scope.setdefault("state", {})
        state["admin"] = admin is not None
        state["key"] = admin or self._state.api_keys.fingerprint(header)
        if path == "/admin" or path.startswith("/admin/"):
            if admin is not None:
                return None
            return _unauthorised("this path needs an admin key")
        if state["key"] is None and self._state.api_keys:
            return _unauthorised("send `Authorization: Bearer <API key>` with a valid key")
        return None


def _unauthorised(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not allowed here"}
    message = known.get(error.status_code, error.detail)
    return ApiError(error.status_code, message, headers=error.headers or {}).response()


def _state(request: Request) -> ServeState:
    state: ServeState = request.app.state.serve
    return state


async def _health(request: Request) -> Response:
    return json_response({"status": "ok"})


async def _ready(request: Request) -> Response:
    state = _state(request)
    if state.draining:
        return json_response({"status": "draining"}, 503)
    if not state.source.models():
        return json_response({"status": "no models"}, 503)
    return json_response({"status": "ready"})


async def _metrics(request: Request) -> Response:
    state = _state(request)
    text = state.metrics.text(state.gauges())
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def _list_models(request: Request) -> Response:
    models = _state(request).source.models()
    return json_response({"object": "list", "data": [model_dict(model) for model in models.values()]})


async def _show_model(request: Request) -> Response:
    return json_response(model_dict(_state(request).model(request.path_params["name"])))


async def _chat(request: Request) -> Response:
    state = _state(request)
    wire, ignored = parse_body(await read_body(request, state.settings), ChatRequest)
    job = await chat_job(wire, state.model(wire.model), state.settings, _metadata(request, wire.metadata))
    return Answer(state, job, _ignored(ignored))


async def _text(request: Request) -> Response:
    state = _state(request)
    wire, ignored = parse_body(await read_body(request, state.settings), CompletionRequest)
    job = await text_job(wire, state.model(wire.model), state.settings, _metadata(request, wire.metadata))
    return Answer(state, job, _ignored(ignored))


def _ignored(names: list[str]) -> dict[str, str]:
    return {"x-ignored-fields": ", ".join(names)} if names else {}


def _metadata(request: Request, given: Mapping[str, str] | None) -> dict[str, Any]:
    metadata: dict[str, Any] = {"request_id": request.state.request_id}
    if request.state.key is not None:
        metadata["api_key"] = request.state.key
    if given:
        metadata["request"] = dict(given)
    return metadata
