"""JudgeModel: a chat with all that calling a judge takes: structure, patience, deadline, budget, cache, counts."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import msgspec

from posttrain.core import Chat, ConfigError, GradeError, Message, Sampling, assistant, content_hash, user
from posttrain.grade.judge_budget import Budget, Price
from posttrain.grade.judge_cache import CachedReply, JudgeCache
from posttrain.grade.judge_reply import ReplyUnreadable, read_reply, reply_schema

V = TypeVar("V", bound=msgspec.Struct)
T = TypeVar("T")
JUDGE_SAMPLING = Sampling(max_tokens=1024, temperature=0.0)

_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_LONGEST_WAIT_S = 60.0
_CHARACTERS_PER_TOKEN = 2.5  # fewer than any usual text has, so that a reservation errs upwards


@runtime_checkable
class StructuredChat(Protocol):
    """A chat that can be held to a JSON schema and tells what it used. `posttrain.engine.RemoteChat` is one."""

    async def chat_structured(
        self, messages: Sequence[Message], sampling: Sampling, schema: Mapping[str, Any] | None
    ) -> tuple[Message, Mapping[str, int]]:
        """The message, and `prompt_tokens` and `completion_tokens` where they are known."""
        ...


class JudgeFailed(GradeError):
    """A judge gave no verdict; `cost` is what was paid all the same."""

    def __init__(self, message: str, cost: float = 0.0) -> None:
        super().__init__(message)
        self.cost = cost


class Answer(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """A judge's verdict and what it took to get it."""

    verdict: T
    text: str
    cost: float = 0.0  # US dollars; 0 where it came from the cache
    cached: bool = False
    attempts: int = 1


class JudgeModel:
    """Asks a chat for verdicts. Any number of graders, threads and event loops may share one.

    Attributes:
        counts: what happened so far: `asked`, `cached`, `calls`, `unreadable` (replies without a verdict), `failed`
            (questions that ended without one), `prompt_tokens`, `completion_tokens`.
    """

    def __init__(
        self,
        chat: Chat,
        *,
        model: str | None = None,
        sampling: Sampling = JUDGE_SAMPLING,
        attempts: int = 3,
        deadline_s: float = 120.0,
        first_wait_s: float = 0.5,
        price: Price | None = None,
        budget: Budget | None = None,
        cache: JudgeCache | None = None,
    ) -> None:
        """Take the chat.

        Args:
            chat: any `Chat`: a server's (`engine.RemoteChat`), a local model's (`engine.EngineChat`), a script.
            model: its name; part of the cache's key. None: the chat's own `model`.
            sampling: how to sample verdicts; greedy by default.
            attempts: calls for one verdict, at most. After an unreadable reply the judge is told what was wrong;
                after a passing failure (a time-out, 429, 5xx) it is asked again later, as Retry-After says or
                twice as long each time, with jitter. (`RemoteChat` has such patience itself; its failures are final.)
            deadline_s: seconds for one verdict, all attempts together.
            first_wait_s: wait before the second attempt.
            price: of the judge's tokens. Where the chat does not tell how many it used, they are estimated.
            budget: shared with others or not.
            cache: of replies; two equal questions under way at the same time are one call.

        Raises:
            ConfigError: a number out of range, a budget in dollars without a price, a cache for a nameless model.
        """
        self.chat = chat
        self._structured = chat if isinstance(chat, StructuredChat) else None  # looked up once: it is slow
        self.model = model or str(getattr(chat, "model", ""))
        self.sampling, self.attempts, self.deadline_s = sampling, attempts, deadline_s
        self.price, self.budget, self.cache = price or Price(), budget, cache
        self.counts: Counter[str] = Counter()
        self._first_wait_s = first_wait_s
        self._under_way: dict[tuple[int, str], tuple[asyncio.Lock, list[None]]] = {}
        if attempts < 1 or deadline_s <= 0:
            raise ConfigError(f"judge {self.model!r}: attempts and deadline_s must be above 0")
        if budget is not None and budget.dollars is not None and price is None:
            raise ConfigError(
                f"judge {self.model!r}: a budget in dollars needs a price: price=Price(input=…, output=…)"
            )
        if cache is not None and not self.model:
            raise ConfigError("a judge with a cache needs a name, or two models would share replies: model='…'")

    async def ask(self, messages: Sequence[Message], kind: type[V], *, sample: int = 0) -> Answer[V]:
        """One verdict, as JSON of the struct `kind`; see `ask_text`."""

        def read(text: str) -> V:
            return read_reply(text, kind)

        return await self.ask_text(messages, read, schema=reply_schema(kind), sample=sample)

    async def ask_text(
        self,
        messages: Sequence[Message],
        read: Callable[[str], T],
        *,
        schema: Mapping[str, Any] | None = None,
        sample: int = 0,
    ) -> Answer[T]:
        """One verdict, read from the reply's text.

        Args:
            messages: the conversation.
            read: makes the verdict; raises ReplyUnreadable where there is none.
            schema: what the reply must be, for chats that can be held to it.
            sample: which of several verdicts on the same question; keeps them apart in the cache and in their seeds.

        Raises:
            JudgeFailed: no verdict: the chat failed, every reply was unreadable, the deadline passed, or the budget is
                spent; the message says which.
        """
        self.counts["asked"] += 1
        key = content_hash([self.model, messages, self.sampling, schema, sample]) if self.cache is not None else ""
        async with self._one_at_a_time(key):
            kept = self.cache.get(key) if self.cache is not None else None
            if kept is not None:
                self.counts["cached"] += 1
                return Answer(verdict=read(kept.text), text=kept.text, cached=True, attempts=0)
            spent: list[float] = []
            try:
                async with asyncio.timeout(self.deadline_s):
                    answer = await self._attempts(messages, read, schema, sample, spent)
            except TimeoutError:
                self.counts["failed"] += 1
                raise JudgeFailed(
                    f"judge {self.model!r}: no verdict within {self.deadline_s:g} s", sum(spent)
                ) from None
            if self.cache is not None:
                self.cache.put(key, CachedReply(text=answer.text, cost=answer.cost))
            return answer

    async def _attempts(
        self,
        messages: Sequence[Message],
        read: Callable[[str], T],
        schema: Mapping[str, Any] | None,
        sample: int,
        spent: list[float],
    ) -> Answer[T]:
        asked = list(messages)
        failure = ""
        for attempt in range(self.attempts):
            wait_s = 0.0
            try:
                text = await self._call(asked, schema, sample, spent)
                verdict = read(text)
                return Answer(verdict=verdict, text=text, cost=sum(spent), attempts=attempt + 1)
            except ReplyUnreadable as error:
                self.counts["unreadable"] += 1
                failure = str(error)
                asked = [*messages, assistant(text[:4000]), user(_again(failure, schema))]
            except Exception as error:  # noqa: BLE001  what a chat raises is data: no verdict, and why
                failure = f"{type(error).__name__}: {error}"
                patience_s = _passing(error)
                if patience_s is None:
                    break
                backed_off_s = self._first_wait_s * 2**attempt * (0.5 + random.random() / 2)
                wait_s = min(_LONGEST_WAIT_S, max(patience_s * (1 + random.random() / 10), backed_off_s))
            if wait_s and attempt + 1 < self.attempts:
                await asyncio.sleep(wait_s)
        self.counts["failed"] += 1
        raise JudgeFailed(f"judge {self.model!r}: {failure}", sum(spent))

    async def _call(
        self, messages: Sequence[Message], schema: Mapping[str, Any] | None, sample: int, spent: list[float]
    ) -> str:
        """One call of the chat, paid for."""
        likely_prompt = round(sum(len(message.content) for message in messages) / _CHARACTERS_PER_TOKEN) + 16
        most = self.price.of(likely_prompt, self.sampling.max_tokens)
        if self.budget is not None:
            self.budget.reserve(most)
        self.counts["calls"] += 1
        paid = most if self.price.of(1, 1) else 0.0  # where the call is cut off, nobody knows: the most it can be
        try:
            sampling = self.sampling
            if sample and sampling.seed is not None:
                sampling = sampling.replace(seed=sampling.seed + sample)
            if self._structured is not None:
                message, used = await self._structured.chat_structured(messages, sampling, schema)
            else:
                message, used = await self.chat.chat(messages, sampling), {}
            prompt_tokens = used.get("prompt_tokens", likely_prompt)
            completion_tokens = used.get("completion_tokens", round(len(message.content) / _CHARACTERS_PER_TOKEN))
            paid = self.price.of(prompt_tokens, completion_tokens)
            self.counts.update(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
        except Exception:
            paid = 0.0  # servers do not charge for what they refuse
            raise
        finally:
            spent.append(paid)
            if self.budget is not None:
                self.budget.settle(most, paid)
        return message.content

    @asynccontextmanager
    async def _one_at_a_time(self, key: str) -> AsyncIterator[None]:
        """Equal questions wait for one another where there is a cache, so that the second finds the first's reply."""
        if self.cache is None:
            yield
            return
        place = (id(asyncio.get_running_loop()), key)
        lock, waiting = self._under_way.setdefault(place, (asyncio.Lock(), []))
        waiting.append(None)
        try:
            async with lock:
                yield
        finally:
            waiting.pop()
            if not waiting:
                self._under_way.pop(place, None)


def _again(problem: str, schema: Mapping[str, Any] | None) -> str:
    form = " Reply with one JSON object of the form that was asked for, and nothing else." if schema else ""
    return f"That reply could not be read: {problem[:300]}.{form}"


def _passing(error: Exception) -> float | None:
    """Seconds to wait at least before another attempt; None: another attempt is useless.

    Knows time-outs, broken connections, and errors that carry an HTTP status as the `openai` and `anthropic` clients'
    do (`status_code`, `response.headers`).
    """
    status = getattr(error, "status_code", None)
    if status in _PASSING:
        headers = getattr(getattr(error, "response", None), "headers", None) or {}
        return retry_after_s(headers.get("retry-after")) or 0.0
    if isinstance(error, TimeoutError | ConnectionError) or getattr(error, "transient", False):
        return 0.0
    return None


def retry_after_s(value: str | None) -> float | None:
    """Seconds to wait, from a Retry-After header: a number or a date (RFC 9110, section 10.2.3); None if neither."""
    from email.utils import parsedate_to_datetime

    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


class ScriptedChat:
    """A chat that answers what a function says. For tests and dry runs of judged recipes; every question is kept.

    Args:
        reply: from the conversation to the reply's text; may raise.
        latency_s: seconds that a call takes, or a function that gives them.
        model: its name.
    """

    def __init__(
        self,
        reply: Callable[[Sequence[Message]], str],
        *,
        latency_s: float | Callable[[], float] = 0.0,
        model: str = "scripted",
    ) -> None:
        self.model = model
        self.asked: list[tuple[Message, ...]] = []
        self._reply, self._latency_s = reply, latency_s

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Message:
        """The script's reply."""
        self.asked.append(tuple(messages))
        seconds = self._latency_s() if callable(self._latency_s) else self._latency_s
        if seconds > 0:
            await asyncio.sleep(seconds)
        return assistant(self._reply(messages))
