"""POST /v1/feedback and GET /v1/feedback/{completion_id}."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from posttrain.core import Feedback, Interaction, ServeError
from posttrain.serve.api_error import ApiError, bad_request, json_response
from posttrain.serve.body import read_body
from posttrain.serve.model import InteractionStore
from posttrain.serve.state import ServeState
from posttrain.serve.wire import FeedbackRequest, parse_body

SIGNALS = ("thumb", "rating", "preferred", "correction", "label")


async def add_feedback(request: Request) -> Response:
    """Store one signal about an answer; 201 with the stored record."""
    state: ServeState = request.app.state.serve
    store = _store(state)
    wire, _ = parse_body(await read_body(request, state.settings), FeedbackRequest)
    feedback = _feedback(wire)
    await _find(request, store, feedback.completion_id, feedback.choice)
    if feedback.rejected_id is not None:
        await _find(request, store, feedback.rejected_id, feedback.rejected_choice)
    try:
        await asyncio.to_thread(store.add, feedback)
    except ServeError as error:
        raise bad_request(str(error), feedback.kind) from None
    state.metrics.count("feedback_total", kind=feedback.kind)
    return json_response(_feedback_dict(feedback), 201)


async def list_feedback(request: Request) -> Response:
    """All signals about one completion."""
    state: ServeState = request.app.state.serve
    store = _store(state)
    completion_id = request.path_params["completion_id"]
    await _find(request, store, completion_id)
    found = await asyncio.to_thread(store.feedback_for, completion_id)
    return json_response({"object": "list", "data": [_feedback_dict(feedback) for feedback in found]})


def _store(state: ServeState) -> InteractionStore:
    if state.store is None:
        raise ApiError(404, "this server keeps no interactions, so it takes no feedback", code="feedback_disabled")
    return state.store


async def _find(request: Request, store: InteractionStore, completion_id: str, choice: int | None = None) -> None:
    """Make sure that the caller may speak of a completion; one of somebody else looks like an unknown one."""
    state: ServeState = request.app.state.serve
    choices = await asyncio.to_thread(store.choices, completion_id)
    mine = [answer for answer in choices if _may_see(request, state, answer)]
    if not mine:
        raise ApiError(
            404, f"there is no completion {completion_id!r}", param="completion_id", code="completion_not_found"
        )
    if choice is not None and choice not in [answer.choice for answer in mine]:
        raise ApiError(
            404, f"the completion {completion_id!r} has no choice {choice}", param="choice", code="choice_not_found"
        )


def _may_see(request: Request, state: ServeState, answer: Interaction) -> bool:
    owner = answer.metadata.get("api_key")
    if owner is None or request.state.admin or state.settings.feedback_scope == "all" or not state.api_keys:
        return True
    return bool(owner == request.state.key)


def _feedback(wire: FeedbackRequest) -> Feedback:
    given = [name for name in SIGNALS if getattr(wire, name) is not UNSET]
    if len(given) != 1:
        said = " and ".join(given) or "none"
        raise bad_request(
            f"give exactly one of {', '.join(SIGNALS)}; the request has {said}", given[0] if given else None
        )
    if (wire.rejected is not UNSET) != (given == ["preferred"]):
        raise bad_request("preferred needs rejected: {completion_id, choice}, other signals take none", "rejected")
    value, extra = _value(wire, given[0])
    return Feedback(
        id=f"fb-{uuid.uuid4().hex}",
        completion_id=wire.completion_id,
        choice=wire.choice,
        kind=given[0],  # type: ignore[arg-type]
        value=value,
        comment=wire.comment,
        source=wire.source,
        created_s=time.time(),
        **extra,
    )


def _value(wire: FeedbackRequest, kind: str) -> tuple[Any, dict[str, Any]]:
    if wire.label is not UNSET:
        return wire.label.value, {"name": wire.label.name}
    if wire.rejected is not UNSET:
        if wire.preferred not in (True, "tie_good", "tie_bad"):
            raise bad_request('preferred must be true, "tie_good" or "tie_bad"', "preferred")
        loser = {
            "rejected_id": wire.rejected.completion_id or wire.completion_id,
            "rejected_choice": wire.rejected.choice,
        }
        return (None if wire.preferred is True else wire.preferred), loser
    if wire.thumb is not UNSET:
        return (wire.thumb if isinstance(wire.thumb, bool) else wire.thumb == "up"), {}
    return getattr(wire, kind), {}


def _feedback_dict(feedback: Feedback) -> dict[str, Any]:
    plain = feedback.to_dict()
    plain.pop("record")
    return {"object": "feedback", **plain}
