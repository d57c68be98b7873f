"""Rewards from a server: batches of answers out, scores back, and nothing else gets in."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urljoin

import msgspec

from posttrain.core import ConfigError, Grade, GradeCase, MissingExtraError, Trajectory
from posttrain.grade.answer import answer_text
from posttrain.grade.judge_model import retry_after_s
from posttrain.grade.url_guard import Resolve, Target, UrlGuard, UrlRefused

_PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_LONGEST_WAIT_S = 60.0
_MAX_REDIRECTS = 3
VERSION = "posttrain-reward/1"


class RewardItem(msgspec.Struct, frozen=True, kw_only=True):
    """One answer as a reward server gets it."""

    id: str
    prompt: str
    answer: str
    messages: list[dict[str, Any]] = []
    reference: str | None = None
    facts: dict[str, Any] = {}


class RewardRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a request: POST, JSON."""

    version: str
    items: list[RewardItem]


class Reward(msgspec.Struct, frozen=True, kw_only=True):
    """One answer's score, or the error that stands for it."""

    id: str
    score: float | None = None
    parts: dict[str, float] = {}
    rationale: str = ""
    error: str | None = None
    cost: float = 0.0


class RewardReply(msgspec.Struct, frozen=True, kw_only=True):
    """The body of the answer: one reward for each item, in any order."""

    grades: list[Reward]


class _Refused(Exception):
    """The request failed; `wait_s` is how long to wait before another attempt, None: another one is useless."""

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class HttpReward:
    """Scores from a reward server. Answers that are graded at the same time travel together.

    POST `{"version": "posttrain-reward/1", "items": [{"id", "prompt", "answer", "messages", "reference", "facts"}]}`;
    the reply is `{"grades": [{"id", "score", "parts", "rationale", "error", "cost"}]}`, where only `id` and one of
    `score` and `error` are needed.

    The URL may not lead into a network: see `UrlGuard`. A redirect is followed only to the same scheme, host and port.
    A reply is cut off at `max_bytes`, compressed ones are refused, and each attempt has a deadline.
    """

    waits = True

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        send_facts: bool = True,
        batch_size: int = 32,
        gather_s: float = 0.01,
        max_requests: int = 8,
        timeout_s: float = 30.0,
        retries: int = 3,
        first_wait_s: float = 0.5,
        max_bytes: int = 4_000_000,
        schemes: Sequence[str] = ("https",),
        allow: Sequence[str] = (),
        resolve: Resolve | None = None,
        transport: Any = None,
        cases: Sequence[GradeCase] = (),
        name: str = "http",
    ) -> None:
        """Take the server's address.

        Args:
            url: where to post.
            headers: sent along, a token for example.
            send_facts: send `task.facts`; switch off where they hold what the server should not see.
            batch_size: answers in one request, at most.
            gather_s: how long the first answer of a batch waits for others.
            max_requests: requests under way, at most.
            timeout_s: for each attempt, from connecting to the reply's last byte.
            retries: further attempts after time-outs, broken connections, 408, 409, 425, 429 and 5xx, waiting as
                Retry-After says or twice as long each time, with jitter.
            first_wait_s: wait before the second attempt.
            max_bytes: of a reply.
            schemes: "https", or "http" too.
            allow: addresses or networks that are allowed although they are not public.
            resolve: a resolver of names; None: the system's.
            transport: an httpx transport, for tests.
            cases: gold answers and near misses: what the server must score.
            name: the grader's name.

        Raises:
            MissingExtraError: httpx is not installed.
            ConfigError: a number out of range, or a URL of a form that is not allowed.
        """
        try:
            import httpx
        except ImportError as error:
            raise MissingExtraError("httpx", "serve", "a reward server") from error
        self.name, self.url = name, url
        self._httpx, self._transport = httpx, transport
        self._tls: Any = None
        self._headers = {"Accept-Encoding": "identity", "Content-Type": "application/json", **(headers or {})}
        self._send_facts, self._batch_size, self._gather_s = send_facts, batch_size, gather_s
        self._timeout_s, self._retries, self._first_wait_s = timeout_s, retries, first_wait_s
        self._max_requests, self._max_bytes = max_requests, max_bytes
        self._cases = tuple(cases)
        self._guard = UrlGuard(schemes=schemes, allow=allow, resolve=resolve)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: list[tuple[Trajectory, asyncio.Future[Grade]]] = []
        self._places = asyncio.Semaphore(max_requests)
        self._batches: set[asyncio.Task[None]] = set()
        at_least_one = min(batch_size, max_requests, max_bytes) >= 1
        if not at_least_one or timeout_s <= 0 or min(retries, gather_s, first_wait_s) < 0:
            raise ConfigError(f"grader {name!r}: sizes and timeout_s must be above 0, retries and waits 0 or more")
        try:
            self._guard.split(url)
        except UrlRefused as error:
            raise ConfigError(f"grader {name!r}: {error}") from error

    @property
    def deadline_s(self) -> float:
        """Seconds that a grade may take: every attempt's, and the waits between them."""
        waits_s: float = sum(min(_LONGEST_WAIT_S, self._first_wait_s * 2**attempt) for attempt in range(self._retries))
        return (self._retries + 1) * self._timeout_s + waits_s + self._gather_s + 1.0

    async def grade(self, trajectory: Trajectory) -> Grade:
        """The server's score; what fails is a grade with an error."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # a second asyncio.run: the first one's waiting answers are gone with it
            self._loop, self._waiting, self._places = loop, [], asyncio.Semaphore(self._max_requests)
        future: asyncio.Future[Grade] = loop.create_future()
        self._waiting.append((trajectory, future))
        if len(self._waiting) >= self._batch_size:
            self._send_waiting()
        elif len(self._waiting) == 1:
            loop.call_later(self._gather_s, self._send_waiting)
        return await future

    def cases(self) -> Sequence[GradeCase]:
        """The cases it was given: what a server scores cannot be guessed."""
        return self._cases

    def _send_waiting(self) -> None:
        batch, self._waiting = self._waiting[: self._batch_size], self._waiting[self._batch_size :]
        if batch:
            task = asyncio.ensure_future(self._settle(batch))
            self._batches.add(task)  # a task that nobody holds may be collected
            task.add_done_callback(self._batches.discard)

    async def _settle(self, batch: Sequence[tuple[Trajectory, asyncio.Future[Grade]]]) -> None:
        wanted = [(trajectory, future) for trajectory, future in batch if not future.done()]
        started_s = time.perf_counter()
        try:
            async with self._places:
                rewards = await self._rewards([trajectory for trajectory, _ in wanted]) if wanted else []
            grades = [_grade(self.name, reward, time.perf_counter() - started_s) for reward in rewards]
        except Exception as error:  # noqa: BLE001  a request that fails is the error of each of its grades
            seconds = time.perf_counter() - started_s
            told = str(error) if isinstance(error, _Refused | UrlRefused) else f"{type(error).__name__}: {error}"
            grades = [Grade(score=None, grader=self.name, error=told, seconds=seconds) for _ in wanted]
        for (_, future), grade in zip(wanted, grades, strict=True):
            if not future.done():
                future.set_result(grade)

    async def _rewards(self, trajectories: Sequence[Trajectory]) -> list[Reward]:
        items = [self._item(str(place), trajectory) for place, trajectory in enumerate(trajectories)]
        body = msgspec.json.encode(RewardRequest(version=VERSION, items=items))
        raw = await self._patiently(body)
        try:
            reply = msgspec.json.decode(raw, type=RewardReply)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise _Refused(f"{self.url}: the reply is not one of a reward server: {error}") from None
        rewards = {reward.id: reward for reward in reply.grades}
        missing = Reward(id="", error=f"{self.url}: the reply has no grade for this answer")
        return [rewards.get(item.id, missing) for item in items]

    def _item(self, id: str, trajectory: Trajectory) -> RewardItem:
        task = trajectory.task
        messages = [] if isinstance(task.prompt, str) else [message.to_dict() for message in task.prompt]
        return RewardItem(
            id=id,
            prompt=task.prompt_text(),
            answer=answer_text(trajectory),
            messages=messages,
            reference=task.answer,
            facts=task.facts if self._send_facts else {},
        )

    async def _patiently(self, body: bytes) -> bytes:
        for attempt in range(self._retries + 1):
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await self._post(body)
            except TimeoutError:
                refused = _Refused(f"{self.url}: no reply within {self._timeout_s:g} s", 0.0)
            except self._httpx.TransportError as error:
                refused = _Refused(f"{self.url}: {type(error).__name__}: {error}", 0.0)
            except _Refused as error:
                refused = error
            if refused.wait_s is None or attempt == self._retries:
                raise refused
            backed_off_s = self._first_wait_s * 2**attempt * (0.5 + random.random() / 2)
            asked_s = refused.wait_s * (1 + random.random() / 10)
            await asyncio.sleep(min(_LONGEST_WAIT_S, max(asked_s, backed_off_s)))
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _post(self, body: bytes) -> bytes:
        """One attempt, following redirects within the same origin."""
        url = self.url
        origin = self._guard.split(url)
        if self._tls is None:  # made once: reading the certificates takes longer than a request
            self._tls = self._httpx.create_ssl_context(trust_env=False)
        async with self._httpx.AsyncClient(
            timeout=self._timeout_s,
            trust_env=False,
            follow_redirects=False,
            verify=self._tls,
            transport=self._transport,
        ) as client:
            for _ in range(_MAX_REDIRECTS + 1):
                target = await self._guard.check(url)
                async with client.stream(
                    "POST",
                    target.url,
                    content=body,
                    headers={**self._headers, "Host": target.host_header},
                    extensions={"sni_hostname": target.host},
                ) as reply:
                    if reply.status_code not in (307, 308):
                        return await self._read(reply, target)
                    url = urljoin(url, reply.headers.get("location", ""))
                    new = self._guard.split(url)
                if (new.scheme, new.hostname, new.port) != (origin.scheme, origin.hostname, origin.port):
                    raise _Refused(f"{self.url} redirects to another host, {new.scheme}://{new.netloc}; not followed")
        raise _Refused(f"{self.url} redirects more than {_MAX_REDIRECTS} times")

    async def _read(self, reply: Any, target: Target) -> bytes:
        if reply.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
            raise _Refused(f"{self.url}: the reply is compressed, which was not asked for")
        raw = bytearray()
        async for chunk in reply.aiter_bytes():
            raw += chunk
            if len(raw) > self._max_bytes:
                raise _Refused(f"{self.url}: the reply is longer than {self._max_bytes} bytes")
        if reply.status_code == 200:
            return bytes(raw)
        told = f"{self.url} answered {reply.status_code}: {bytes(raw[:300]).decode('utf-8', 'replace')}"
        if reply.status_code not in _PASSING:
            raise _Refused(told)
        raise _Refused(told, retry_after_s(reply.headers.get("retry-after")) or 0.0)


def _grade(name: str, reward: Reward, seconds: float) -> Grade:
    error = reward.error
    if error is None and reward.score is None:
        error = "the server gave neither a score nor an error"
    return Grade(
        score=None if error is not None else reward.score,
        grader=name,
        parts=reward.parts,
        rationale=reward.rationale,
        error=error,
        seconds=seconds,
        cost=reward.cost,
    )
