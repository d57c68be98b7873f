"""Samplers that are not a decoder: the script, and a server behind a fake transport."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from posttrain.core import EngineError, Message, SampleRequest, Sampling, StopReason, ToolCall, system, user
from posttrain.engine import EngineChat, RemoteChat, RemoteEngine, RemoteFailure, ScriptedEngine
from posttrain.engine.http import JsonClient

Handler = Callable[[httpx.Request], httpx.Response]


def run(engine: Any, *requests: SampleRequest) -> Any:
    return asyncio.run(engine.sample(requests))


def ask(text: str, name: str = "", **options: Any) -> SampleRequest:
    return SampleRequest(prompt=tuple(text.encode()), sampling=Sampling(**options), id=name)


def choice(index: int, text: str, finish: str = "stop", **more: Any) -> dict[str, Any]:
    return {"index": index, "text": text, "finish_reason": finish, **more}


def remote(handler: Handler, tokenizer: Any, **options: Any) -> RemoteEngine:
    engine = RemoteEngine(
        "http://server", "m", tokenizer=tokenizer, transport=httpx.MockTransport(handler), **{"retries": 2, **options}
    )
    engine._client._first_wait_s = 0.001
    return engine


def test_the_script_answers_with_exact_tokens(tokenizer: Any) -> None:
    engine = ScriptedEngine({"2+2=": ["4", "five"], tuple(b"ids"): "found"}, tokenizer)
    (sums, ids) = run(engine, ask("2+2=", "a", n=3), ask("ids", "b"))
    assert [completion.text for completion in sums] == ["4", "five", "4"]
    assert sums[1].tokens == (*b"five", 256)
    assert sums[1].stop_reason is StopReason.EOS
    assert len(sums[1].logprobs) == len(sums[1].policy_logprobs) == 5
    assert all(-2 <= value <= 0 for value in sums[1].logprobs)
    assert (sums[2].index, sums[2].request_id, sums[2].num_prompt_tokens) == (2, "a", 4)
    assert ids[0].text == "found"
    assert [request.id for request in engine.requests] == ["a", "b"]


def test_the_script_may_be_a_function_and_is_cut_at_max_tokens(tokenizer: Any) -> None:
    engine = ScriptedEngine(lambda request: f"seen {len(request.prompt)}", tokenizer, latency_s=0.05)
    start = time.monotonic()
    ((cut,),) = run(engine, ask("abc", max_tokens=3))
    assert time.monotonic() - start >= 0.05
    assert (cut.text, cut.stop_reason) == ("see", StopReason.LENGTH)


def test_the_script_can_fail_and_says_what_it_does_not_know(tokenizer: Any) -> None:
    engine = ScriptedEngine({"a": "b"}, tokenizer, fail=lambda request, index: "broken" if index == 1 else None)
    (pair,) = run(engine, ask("a", n=2))
    assert [completion.stop_reason for completion in pair] == [StopReason.EOS, StopReason.ERROR]
    assert (pair[1].error, pair[1].tokens) == ("broken", ())
    with pytest.raises(EngineError, match="no answer to 'unknown'"):
        run(engine, ask("unknown"))


def test_a_server_with_token_ids_gives_exact_tokens_and_logprobs(tokenizer: Any) -> None:
    seen: list[dict[str, Any]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        assert str(request.url) == "http://server/v1/completions"
        assert request.headers["authorization"] == "Bearer secret"
        seen.append(json.loads(request.content))
        choices = [
            choice(1, "hi", "length", token_ids=[104, 105], logprobs={"token_logprobs": [-0.5, -0.25]}),
            choice(0, "x", token_ids=[120, 256], logprobs={"token_logprobs": [-1.0, -2.0]}),
        ]
        return httpx.Response(200, json={"choices": choices})

    engine = remote(handler, tokenizer, api_key="secret")
    ((first, second),) = run(engine, ask("ab", "r", n=2, seed=4, max_tokens=9))
    assert (first.tokens, first.logprobs, first.stop_reason) == ((120, 256), (-1.0, -2.0), StopReason.EOS)
    assert (second.tokens, second.policy_logprobs, second.stop_reason) == ((104, 105), (-0.5, -0.25), StopReason.LENGTH)
    assert (second.index, second.request_id, second.num_prompt_tokens) == (1, "r", 2)
    body = seen[0]
    assert body["prompt"] == [97, 98]
    assert (body["n"], body["max_tokens"], body["return_token_ids"]) == (2, 9, True)
    assert 0 <= body["seed"] < 2**31
    assert not {"top_k", "min_p", "stop", "stop_token_ids", "ignore_eos"} & set(body)


@pytest.mark.parametrize(
    ("options", "known"),
    [({}, True), ({"temperature": 0.0}, True), ({"temperature": 0.5}, False), ({"top_k": 3}, False)],
)
def test_logprobs_of_a_changed_distribution_are_not_made_up(
    tokenizer: Any, options: dict[str, Any], known: bool
) -> None:
    reply = {"choices": [choice(0, "x", token_ids=[120], logprobs={"token_logprobs": [-1.0]})]}
    ((completion,),) = run(remote(lambda _: httpx.Response(200, json=reply), tokenizer), ask("a", **options))
    assert completion.policy_logprobs == (-1.0,)
    if known:
        assert completion.logprobs == ((0.0,) if options.get("temperature") == 0 else (-1.0,))
    else:
        assert math.isnan(completion.logprobs[0])


def test_a_server_without_token_ids_gives_text_and_unknown_logprobs(tokenizer: Any) -> None:
    reply = {"choices": [choice(0, "hey", logprobs={"token_logprobs": [-1.0]})]}
    ((completion,),) = run(remote(lambda _: httpx.Response(200, json=reply), tokenizer), ask("a"))
    assert completion.tokens == tuple(b"hey")
    assert len(completion.logprobs) == len(completion.policy_logprobs) == 3
    assert all(math.isnan(value) for value in (*completion.logprobs, *completion.policy_logprobs))


def test_stop_reasons_of_servers(tokenizer: Any) -> None:
    def reason(more: dict[str, Any], **options: Any) -> StopReason:
        reply = {"choices": [choice(0, "x", **more)]}
        ((completion,),) = run(remote(lambda _: httpx.Response(200, json=reply), tokenizer), ask("a", **options))
        return completion.stop_reason  # type: ignore[no-any-return]

    assert reason({"token_ids": [120, 256]}, stop=("#",)) is StopReason.EOS
    assert reason({"token_ids": [120, 35]}, stop=("#",)) is StopReason.STOP
    assert reason({"token_ids": [120], "stop_reason": "#"}, stop=("#",)) is StopReason.STOP
    assert reason({"token_ids": [120, 7]}, stop=("#",), stop_tokens=(7,)) is StopReason.EOS
    assert reason({"token_ids": [120]}) is StopReason.EOS
    assert reason({"token_ids": [120], "finish": "content_filter"}) is StopReason.ERROR


def test_retries_obey_retry_after_and_then_succeed(tokenizer: Any) -> None:
    times: list[float] = []

    def handler(_: httpx.Request) -> httpx.Response:
        times.append(time.monotonic())
        if len(times) == 1:
            return httpx.Response(429, headers={"Retry-After": "0.2"}, json={})
        if len(times) == 2:
            raise httpx.ConnectError("refused")
        return httpx.Response(200, json={"choices": [choice(0, "ok", token_ids=[111, 107])]})

    ((completion,),) = run(remote(handler, tokenizer), ask("a"))
    assert completion.text == "ok"
    assert times[1] - times[0] >= 0.19
    assert len(times) == 3


@pytest.mark.parametrize(
    ("handler", "reason", "said", "attempts"),
    [
        (lambda: httpx.Response(503, text="busy"), StopReason.ERROR, "answered 503: busy", 3),
        (lambda: httpx.Response(400, text="bad field"), StopReason.ERROR, "answered 400: bad field", 1),
        (lambda: httpx.Response(200, text="<html>"), StopReason.ERROR, "not JSON", 1),
        (lambda: httpx.Response(200, json={"nothing": 1}), StopReason.ERROR, "not a completion", 1),
        (lambda: httpx.Response(200, json={"choices": []}), StopReason.ERROR, "0 completions instead of 2", 1),
        (httpx.ReadTimeout("slow"), StopReason.TIMEOUT, "no answer within", 3),
        (httpx.ConnectError("refused"), StopReason.ERROR, "refused", 3),
    ],
)
def test_failures_are_completions(tokenizer: Any, handler: Any, reason: StopReason, said: str, attempts: int) -> None:
    calls: list[int] = []

    def answer(_: httpx.Request) -> httpx.Response:
        calls.append(1)
        if isinstance(handler, Exception):
            raise handler
        return handler()  # type: ignore[no-any-return]

    (pair,) = run(remote(answer, tokenizer), ask("a", "r", n=2))
    assert [completion.stop_reason for completion in pair] == [reason] * 2
    assert all(said in (completion.error or "") for completion in pair)
    assert [completion.index for completion in pair] == [0, 1]
    assert len(calls) == attempts


def test_only_so_many_requests_at_once(tokenizer: Any) -> None:
    now, most = 0, 0

    async def handler(_: httpx.Request) -> httpx.Response:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return httpx.Response(200, json={"choices": [choice(0, "k", token_ids=[107])]})

    engine = remote(handler, tokenizer, max_concurrency=3)  # type: ignore[arg-type]
    out = run(engine, *(ask("a") for _ in range(12)))
    assert len(out) == 12
    assert most == 3
    run(engine, ask("a"))  # another event loop gets its own connections


def test_one_failing_request_does_not_harm_the_others(tokenizer: Any) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if json.loads(request.content)["prompt"] == [98]:
            return httpx.Response(400, text="no")
        return httpx.Response(200, json={"choices": [choice(0, "k", token_ids=[107])]})

    out = run(remote(handler, tokenizer), ask("a"), ask("b"), ask("c"))
    assert [pair[0].stop_reason for pair in out] == [StopReason.EOS, StopReason.ERROR, StopReason.EOS]


def test_addresses_with_and_without_v1() -> None:
    for url in ("http://s:1", "http://s:1/", "http://s:1/v1", "http://s:1/v1/"):
        client = JsonClient(url, api_key=None, timeout_s=1, retries=0, max_concurrency=1)
        assert client.url == "http://s:1/v1"


class Renders:
    stop_tokens = frozenset({33})

    def render(self, messages: Any, *, add_generation_prompt: bool = False) -> Any:
        text = "|".join(f"{message.role}:{message.content}" for message in messages)

        class Rendered:
            tokens = tuple((text + (">" if add_generation_prompt else "")).encode())

        return Rendered()


def test_chat_over_an_engine(tokenizer: Any) -> None:
    engine = ScriptedEngine({"system:be brief|user:hi>": "hello"}, tokenizer)
    chat = EngineChat(engine, Renders())
    message = asyncio.run(chat.chat([system("be brief"), user("hi")], Sampling(stop_tokens=(9,), n=4)))
    assert message == Message(role="assistant", content="hello")
    assert engine.requests[0].sampling.stop_tokens == (9, 33)
    assert engine.requests[0].sampling.n == 1
    failing = EngineChat(ScriptedEngine(lambda _: "", tokenizer, fail=lambda *_: "no power"), Renders())
    with pytest.raises(EngineError, match="no power"):
        asyncio.run(failing.chat([user("hi")], Sampling()))


def test_chat_over_a_server() -> None:
    seen: list[dict[str, Any]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content))
        call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 3}'}}
        message = {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]}
        return httpx.Response(200, json={"choices": [{"message": message}]})

    chat = RemoteChat("http://s", "judge", transport=httpx.MockTransport(handler))
    earlier = Message(role="assistant", tool_calls=(ToolCall(name="f", arguments={"x": 1}),))
    messages = [user("hi"), earlier, Message(role="tool", content="1", tool_call_id="call_0")]
    answer = asyncio.run(chat.chat(messages, Sampling(temperature=0, stop=("#",))))
    assert answer.tool_calls == (ToolCall(name="look", arguments={"at": 3}, id="c1"),)
    assert (answer.content, answer.reasoning) == ("", "hm")
    assert seen[0]["messages"][1]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"x": 1}'}
    assert seen[0]["messages"][2] == {"role": "tool", "content": "1", "tool_call_id": "call_0"}
    assert (seen[0]["stop"], seen[0]["temperature"], "top_k" in seen[0]) == (["#"], 0, False)


def test_chat_failures_are_errors_that_say_what() -> None:
    refused = RemoteChat("http://s", "m", transport=httpx.MockTransport(lambda _: httpx.Response(401, text="key?")))
    with pytest.raises(RemoteFailure, match="401: key"):
        asyncio.run(refused.chat([user("hi")], Sampling()))
    empty = RemoteChat("http://s", "m", transport=httpx.MockTransport(lambda _: httpx.Response(200, json={})))
    with pytest.raises(RemoteFailure, match="not a chat completion"):
        asyncio.run(empty.chat([user("hi")], Sampling()))
