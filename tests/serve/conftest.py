"""A tokenizer of characters, an engine that writes what it is told at a set pace, and a running server."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from posttrain import serve
from posttrain.core import Completion, EngineError, Message, RenderError, SampleRequest, StopReason
from posttrain.feedback import FeedbackStore

EOS = 0


class CharTokenizer:
    """Token id = code point; 0 ends a sequence."""

    vocab_size = 0x3000
    eos_ids = frozenset((EOS,))

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return [min(ord(character), self.vocab_size - 1) for character in text]

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join("" if token == EOS else chr(token) for token in tokens)


class PlainRenderer:
    """`<role>content` turns. Refuses a text it is told to."""

    stop_tokens = (EOS,)

    def __init__(self) -> None:
        self.tokenizer = CharTokenizer()

    def prompt(self, prompt: str | Sequence[Message], *, tools: Sequence[Any] = ()) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt))
        text = "".join(f"<{message.role}>{message.content}" for message in prompt) + "<assistant>"
        if "no template" in text:
            raise RenderError("the chat template refuses these messages")
        return tuple(self.tokenizer.encode(text))


@dataclass(frozen=True)
class Event:
    index: int
    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    policy_logprobs: tuple[float, ...]
    top_logprobs: tuple[dict[int, float], ...] = ()
    completion: Completion | None = None


class PacedEngine:
    """Writes `answer` of a request, a character per step, all choices side by side.

    The choice's index is appended to the answer, so choices differ. Logprobs are −0.5, −0.25 the policy's.
    """

    max_length = 4096

    def __init__(
        self, answer: Callable[[str], str] = lambda prompt: f"echo {prompt[-40:]}", step_s: float = 0.0
    ) -> None:
        self.answer, self.step_s = answer, step_s
        self.running = 0
        self.peak = 0
        self.started = 0
        self.weight_version = 3
        self.requests: list[SampleRequest] = []
        self.raises: Exception | None = None

    def stats(self) -> dict[str, int]:
        return {"num_running": self.running, "num_waiting": 0}

    async def stream(self, request: SampleRequest) -> AsyncIterator[Event]:
        if self.raises is not None:
            raise self.raises
        if len(request.prompt) + request.sampling.max_tokens > self.max_length:
            raise EngineError("the request is larger than the cache")
        self.requests.append(request)
        self.running += request.sampling.n
        self.started += 1
        self.peak = max(self.peak, self.running)
        try:
            prompt = "".join(map(chr, request.prompt))
            answers = [self.answer(prompt) + str(index) * bool(index) for index in range(request.sampling.n)]
            ended = set()
            for step in itertools.count():
                for index, answer in enumerate(answers):
                    if index not in ended:
                        event = self._step(request, index, answer, step)
                        if event.completion is not None:
                            ended.add(index)
                        yield event
                if len(ended) == len(answers):
                    return
                await asyncio.sleep(self.step_s)
        finally:
            self.running -= request.sampling.n

    def _step(self, request: SampleRequest, index: int, answer: str, step: int) -> Event:
        sampling = request.sampling
        written = answer[: step + 1]
        stop = next((text for text in sampling.stop if text in written), None)
        reason = None
        if stop is not None:
            reason = StopReason.STOP
        elif step >= len(answer):
            reason = StopReason.EOS
        elif step + 1 == sampling.max_tokens:
            reason = StopReason.LENGTH
        token = EOS if reason is StopReason.EOS else ord(answer[step])
        top = ({token: -0.25, ord("z"): -2.0},) if sampling.top_logprobs else ()
        text = "" if reason in (StopReason.EOS, StopReason.STOP) else answer[step]
        completion = None
        if reason is not None:
            tokens = (*map(ord, answer[:step]), token)
            completion = Completion(
                tokens=tokens,
                logprobs=(-0.5,) * len(tokens),
                policy_logprobs=(-0.25,) * len(tokens),
                text=written[: written.index(stop)] if stop else "".join(chr(t) for t in tokens if t != EOS),
                stop_reason=reason,
                index=index,
                weight_version=self.weight_version,
                top_logprobs=tuple({t: -0.25, ord("z"): -2.0} for t in tokens) if top else (),
            )
        return Event(index, (token,), text, (-0.5,), (-0.25,), top, completion)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@pytest.fixture
def engine() -> PacedEngine:
    return PacedEngine()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FeedbackStore]:
    with FeedbackStore(tmp_path / "store.db") as opened:
        yield opened


@pytest.fixture
def model(engine: PacedEngine) -> serve.ServedModel:
    return serve.ServedModel(name="tiny", card_id="card-1", engine=engine, renderer=PlainRenderer())


@pytest.fixture
def server(model: serve.ServedModel, store: FeedbackStore) -> Iterator[serve.Server]:
    app = serve.create_app({"tiny": model}, store=store, api_keys=["key-a", "key-b"], admin_keys=["root"])
    with serve.Server(app) as running:
        yield running
