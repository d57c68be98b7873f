"""What a server needs of the rest of the house, as Protocols, and the table of models that it serves."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import msgspec

from posttrain.core import (
    Completion,
    Feedback,
    Interaction,
    Message,
    Record,
    SampleRequest,
    SampleTokens,
    ServeError,
    TextTokenizer,
    ToolSpec,
)


class StreamEvent(Protocol):
    """A step of one choice: new tokens, or its end."""

    @property
    def index(self) -> int:
        """Which of the request's n choices."""
        ...

    @property
    def tokens(self) -> Sequence[int]:
        """New token ids since the choice's last event."""
        ...

    @property
    def text(self) -> str:
        """New text, safe to show: what might still become a stop string is held back."""
        ...

    @property
    def logprobs(self) -> Sequence[float]:
        """Of the new tokens, under the distribution that was sampled from."""
        ...

    @property
    def policy_logprobs(self) -> Sequence[float]:
        """Of the new tokens, under the model itself: temperature 1, no truncation."""
        ...

    @property
    def top_logprobs(self) -> Sequence[dict[int, float]]:
        """The likeliest tokens at each new position, if asked for."""
        ...

    @property
    def completion(self) -> Completion | None:
        """The whole choice, with its last event."""
        ...


class StreamTokens(Protocol):
    """A sampler that shows its work. `posttrain.engine.LocalEngine` is one."""

    def stream(self, request: SampleRequest) -> AsyncIterator[StreamEvent]:
        """Events of one request; closing the iterator withdraws it and frees its place."""
        ...


class _WholeAnswer(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A choice's only event."""

    completion: Completion

    @property
    def index(self) -> int:
        return self.completion.index

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.completion.tokens

    @property
    def text(self) -> str:
        return self.completion.text

    @property
    def logprobs(self) -> tuple[float, ...]:
        return self.completion.logprobs

    @property
    def policy_logprobs(self) -> tuple[float, ...]:
        return self.completion.policy_logprobs

    @property
    def top_logprobs(self) -> tuple[dict[int, float], ...]:
        return self.completion.top_logprobs


class WholeAnswers:
    """Serves a sampler that does not stream: each choice is one event, at its end. Cancelling cancels `sample`."""

    def __init__(self, sampler: SampleTokens) -> None:
        self.sampler = sampler

    async def stream(self, request: SampleRequest) -> AsyncIterator[StreamEvent]:
        """One event per choice."""
        (completions,) = await self.sampler.sample([request])
        for completion in completions:
            yield _WholeAnswer(completion=completion)


class PromptRenderer(Protocol):
    """Messages to tokens. `posttrain.render.Renderer` is one."""

    @property
    def tokenizer(self) -> TextTokenizer:
        """Text to token ids and back."""
        ...

    @property
    def stop_tokens(self) -> Iterable[int]:
        """Ids that end the assistant's turn."""
        ...

    def prompt(self, prompt: str | Sequence[Message], /, *, tools: Sequence[ToolSpec] = ()) -> Sequence[int]:
        """The tokens to sample after. Text is taken as it stands; messages go through the chat template."""
        ...


@runtime_checkable
class ParsesAnswers(Protocol):
    """A renderer that also reads what the model wrote: reasoning, tool calls."""

    def parse(self, text: str) -> Message:
        """The assistant's message."""
        ...


class InteractionStore(Protocol):
    """Where served answers and signals about them are kept. `posttrain.feedback.FeedbackStore` is one."""

    def log_many(self, interactions: Iterable[Interaction]) -> int:
        """Store served answers, all or none; the same ones again are no error."""
        ...

    def choices(self, completion_id: str) -> Sequence[Interaction]:
        """All choices of one completion; empty if it is unknown."""
        ...

    def add(self, feedback: Feedback) -> None:
        """Store one signal. ServeError: it names an unknown completion or its value does not fit its kind."""
        ...

    def feedback_for(self, completion_id: str) -> Sequence[Feedback]:
        """All signals that name a completion."""
        ...


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """One model behind the API. A request keeps the object it began with, so a swap never mixes two models."""

    name: str  # what clients put in `model`
    engine: StreamTokens
    renderer: PromptRenderer
    card_id: str = ""  # of the registry; written into every interaction. Empty: the name stands in
    context_tokens: int | None = None  # prompt and answer together, at most; None: the engine's `max_length`, if any
    default_max_tokens: int = 512  # where a chat request names none, within the context
    created_s: float = 0.0  # Unix time of the card

    @property
    def model_id(self) -> str:
        """What interactions record as their model."""
        return self.card_id or self.name

    @property
    def context(self) -> int | None:
        """Tokens of prompt and answer together, at most; None: only the engine knows."""
        own = self.context_tokens or getattr(self.engine, "max_length", None)
        return own if isinstance(own, int) else None

    @property
    def weight_version(self) -> int:
        """Version of the weights that the next token is sampled from, as far as the engine says."""
        version = getattr(self.engine, "weight_version", 0)
        return version if isinstance(version, int) else 0


class ModelSource(Protocol):
    """Says which models are served now. Asked at every request, so it may change its mind between two."""

    def models(self) -> Mapping[str, ServedModel]:
        """Served models by name."""
        ...


@runtime_checkable
class SwapsModels(Protocol):
    """A `ModelSource` that can load another version of a model when an administrator asks."""

    def swap(self, name: str, card_id: str | None) -> ServedModel:
        """Serve the card (None: the newest champion) under this name from the next request on; may take its time.

        Raises:
            PosttrainError: it cannot be served; the one before stays.
        """
        ...


class ModelTable:
    """A `ModelSource` whose entries can be replaced while serving. Safe to share between threads."""

    def __init__(self, models: Iterable[ServedModel] = ()) -> None:
        self._lock = threading.Lock()
        self._models: dict[str, ServedModel] = {}
        for model in models:
            if model.name in self._models:
                raise ServeError(f"two served models are named {model.name!r}; names must differ")
            self._models[model.name] = model

    def models(self) -> Mapping[str, ServedModel]:
        """Served models by name."""
        return self._models

    def put(self, model: ServedModel) -> ServedModel | None:
        """Serve a model from the next request on, in place of the one of that name, which is returned.

        Requests that have begun go on with the model they began with; close its engine when it is idle.
        """
        with self._lock:
            previous = self._models.get(model.name)
            self._models = {**self._models, model.name: model}  # readers hold the old mapping, unchanged
            return previous

    def remove(self, name: str) -> ServedModel:
        """Stop serving a model.

        Raises:
            ServeError: no such model is served.
        """
        with self._lock:
            if name not in self._models:
                raise ServeError(f"no model {name!r} is served; served: {', '.join(sorted(self._models)) or 'none'}")
            removed = self._models[name]
            self._models = {key: model for key, model in self._models.items() if key != name}
            return removed


def engine_stats(engine: StreamTokens) -> dict[str, Any]:
    """The engine's own figures, where it keeps any, as plain values."""
    stats = getattr(engine, "stats", None)
    if not callable(stats):
        return {}
    found = stats()
    if isinstance(found, Mapping):
        return dict(found)
    plain = msgspec.to_builtins(found)
    return plain if isinstance(plain, dict) else {}
