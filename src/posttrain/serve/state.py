"""What the endpoints of one server share: settings, keys, models, the log, and who is being served."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Annotated

from posttrain.core import Config, ServeError, doc
from posttrain.serve.api_error import ApiError
from posttrain.serve.generation import Choice
from posttrain.serve.interaction_log import InteractionLog
from posttrain.serve.metrics import Labels, ServeMetrics, engine_gauges
from posttrain.serve.model import InteractionStore, ModelSource, ServedModel, engine_stats


class ServeSettings(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of a server."""

    max_body_bytes: Annotated[int, doc("largest request body, bytes", ge=1)] = 4 * 2**20
    read_timeout_s: Annotated[float, doc("longest time a request's body may take to arrive, seconds", gt=0)] = 60.0
    request_timeout_s: Annotated[float, doc("longest generation, seconds", gt=0)] = 600.0
    max_pending: Annotated[int, doc("choices in work or waiting; more are refused with 429", ge=1)] = 256
    max_choices: Annotated[int, doc("choices of one request: prompts × n", ge=1)] = 64
    feedback_scope: Annotated[str, doc("'key': feedback only with the key that got the answer; 'all': any key")] = "key"


class Keys:
    """API keys, kept as digests."""

    def __init__(self, keys: Collection[str]) -> None:
        if isinstance(keys, str) or not all(isinstance(key, str) and key for key in keys):
            raise ServeError("API keys must be a collection of non-empty texts")
        self._digests = [_digest(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def fingerprint(self, header: bytes | None) -> str | None:
        """Twelve hex digits that stand for the key of an `Authorization: Bearer …` header; None: no known key.

        Takes the same time whichever key it is, and however much of it is right.
        """
        scheme, _, token = (header or b"").partition(b" ")
        given = _digest(token.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return given.hex()[:12] if any(matches) and scheme.lower() == b"bearer" else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class ServeState:
    """State of one application. Used from one event loop, but for the metrics."""

    def __init__(
        self,
        source: ModelSource,
        store: InteractionStore | None,
        settings: ServeSettings,
        api_keys: Keys,
        admin_keys: Keys,
    ) -> None:
        self.source, self.store, self.settings = source, store, settings
        self.api_keys, self.admin_keys = api_keys, admin_keys
        self.metrics = ServeMetrics()
        self.log = None if store is None else InteractionLog(store, self.metrics)
        self.draining = False  # set at SIGTERM: not ready, no new generation
        self.num_requests = 0  # generation requests being answered
        self.pending = 0  # their choices
        self._typical_s = 1.0  # running mean of a request's duration

    def model(self, name: str) -> ServedModel:
        """The model of a request.

        Raises:
            ApiError: 404.
        """
        models = self.source.models()
        if name not in models:
            raise ApiError(
                404,
                f"the model {name!r} is not served here; GET /v1/models lists those that are",
                param="model",
                code="model_not_found",
            )
        return models[name]

    @contextmanager
    def admit(self, num_choices: int) -> Iterator[None]:
        """Hold places for a request's choices.

        Raises:
            ApiError: 429 with Retry-After when too much is pending, 503 while the server drains.
        """
        if self.draining:
            self.metrics.count("requests_rejected_total", reason="draining")
            raise ApiError(503, "the server is shutting down; send the request again", headers=_retry(1.0))
        if self.pending + num_choices > self.settings.max_pending:
            self.metrics.count("requests_rejected_total", reason="queue_full")
            raise ApiError(
                429,
                f"{self.pending} answers are pending, of {self.settings.max_pending} at most; send it again later",
                code="queue_full",
                headers=_retry(self._typical_s),
            )
        self.pending += num_choices
        self.num_requests += 1
        start = asyncio.get_running_loop().time()
        try:
            yield
        finally:
            self.pending -= num_choices
            self.num_requests -= 1
            self._typical_s += 0.1 * (asyncio.get_running_loop().time() - start - self._typical_s)

    def gauges(self) -> dict[str, dict[Labels, float]]:
        """Figures that are read when they are asked for."""
        gauges: dict[str, dict[Labels, float]] = {"requests_in_flight": {(): float(self.num_requests)}}
        gauges["choices_pending"] = {(): float(self.pending)}
        for name, model in self.source.models().items():
            for gauge, value in engine_gauges(engine_stats(model.engine)).items():
                gauges.setdefault(gauge, {})[(("model_name", name),)] = value
        return gauges

    async def idle(self) -> None:
        """Wait until no request is being answered and everything is logged."""
        while self.num_requests:
            await asyncio.sleep(0.02)
        if self.log is not None:
            await self.log.flush()


class Observer:
    """Latency of one request's tokens."""

    def __init__(self, metrics: ServeMetrics, model: str, start_s: float) -> None:
        self._metrics, self._model, self._start_s = metrics, model, start_s
        self._last_s: dict[int, float] = {}

    def __call__(self, choice: Choice, num_new: int) -> None:
        """A choice grew, and may have ended."""
        now = asyncio.get_running_loop().time()
        metrics, model = self._metrics, self._model
        if num_new:
            last = self._last_s.get(choice.index)
            if last is None:
                metrics.observe("time_to_first_token_seconds", now - self._start_s, model_name=model)
            else:
                metrics.observe("inter_token_latency_seconds", (now - last) / num_new, num_new, model_name=model)
            self._last_s[choice.index] = now
            metrics.count("generation_tokens_total", num_new, model_name=model)
        if choice.stop_reason is not None:
            metrics.observe("e2e_request_latency_seconds", now - self._start_s, model_name=model)
            metrics.count("request_success_total", finished_reason=str(choice.stop_reason), model_name=model)


def _retry(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(min(60, max(1, math.ceil(seconds))))}
