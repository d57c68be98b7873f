"""The wire: keys, request ids, limits, hostile bodies, metrics. In process, without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from posttrain import serve
from posttrain.core import ConfigError, Interaction, ModelError, ServeError
from posttrain.feedback import FeedbackStore

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
KEY = {"Authorization": "Bearer key-a"}


def call(app: Any, talk: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    """Run a conversation with an application. Errors within it are answers, not exceptions."""

    async def run() -> Any:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await talk(client)

    return asyncio.run(run())


def send(app: Any, method: str, path: str, **kwargs: Any) -> httpx.Response:
    return call(app, lambda client: client.request(method, path, **kwargs))


def post(app: Any, body: Any, path: str = "/v1/chat/completions", headers: dict[str, str] = KEY) -> httpx.Response:
    return send(app, "POST", path, json=body, headers=headers)


@pytest.fixture
def app(model: serve.ServedModel, store: FeedbackStore) -> Any:
    return serve.create_app({"tiny": model}, store=store, api_keys=["key-a", "key-b"], admin_keys=["root"])


CLOSED = (
    "/v1/models /v1/models/tiny /v1/chat/completions /v1/completions /v1/feedback /v1/feedback/x /admin/models / /v1 "
    "//v1/models /v2/anything /docs /metrics/ /admin"
).split()


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer key-", "Basic key-a", "Bearer ", "Bearer key-a\xff"])
def test_every_path_but_three_needs_a_key(app: Any, header: str | None) -> None:
    headers = {} if header is None else {b"authorization": header.encode("latin-1")}

    async def knock(client: httpx.AsyncClient) -> None:
        for path in CLOSED:
            for method in ("GET", "POST"):
                answer = await client.request(method, path, headers=headers)
                assert answer.status_code == 401, path
                assert answer.json()["error"]["type"] == "authentication_error"

    call(app, knock)


def test_open_paths_and_keys(app: Any) -> None:
    for path in ("/health", "/ready", "/metrics"):
        assert send(app, "GET", path).status_code == 200
    for key in ("key-a", "key-b", "root"):
        assert send(app, "GET", "/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    assert send(app, "GET", "/admin/models", headers=KEY).status_code == 401
    answer = send(app, "GET", "/admin/models", headers={"Authorization": "Bearer root"})
    assert answer.json()["data"][0]["engine"] == {"num_running": 0, "num_waiting": 0}


def test_admin_is_closed_without_admin_keys_even_where_the_api_is_open(model: serve.ServedModel) -> None:
    app = serve.create_app({"tiny": model})
    assert send(app, "GET", "/v1/models").status_code == 200
    assert send(app, "GET", "/admin/models").status_code == 401
    assert send(app, "GET", "/admin/models", headers={"Authorization": "Bearer "}).status_code == 401


def test_keys_must_be_texts() -> None:
    with pytest.raises(ServeError, match="non-empty"):
        serve.create_app({}, api_keys=[""])
    with pytest.raises(ServeError, match="collection"):
        serve.create_app({}, api_keys="secret")
    with pytest.raises(ConfigError, match="max_pending"):
        serve.create_app({}, max_pendings=3)


def test_request_id_is_echoed_or_made(app: Any) -> None:
    assert post(app, CHAT, headers={**KEY, "x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert len(post(app, CHAT, headers={**KEY, "x-request-id": "a b"}).headers["x-request-id"]) == 32
    assert len(post(app, CHAT, headers={**KEY, "x-request-id": "x" * 129}).headers["x-request-id"]) == 32
    assert "x-request-id" in send(app, "GET", "/v1/models").headers  # of a refusal too


def field(app: Any, **change: Any) -> tuple[int, str | None]:
    answer = post(app, {**CHAT, **change})
    return answer.status_code, answer.json().get("error", {}).get("param")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"),
        ("temperature", -0.1),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("max_tokens", 1.5),
        ("max_tokens", 10**30),
        ("n", 0),
        ("n", 65),
        ("n", "2"),
        ("seed", 2**63),
        ("seed", 0.5),
        ("stop", 5),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stream", "yes"),
        ("top_logprobs", 21),
        ("top_logprobs", 1),
        ("min_p", 2),
        ("top_k", -2),
        ("user", 7),
        ("stream_options", {"include_usage": True}),
        ("model", 5),
        ("model", ""),
        ("messages", "hi"),
        ("messages", []),
        ("logit_bias", {"5": 1}),
        ("frobnicate", 1),
        ("response_format", {"type": "json_schema"}),
        ("presence_penalty", 0.1),
        ("tools", 5),
        ("tool_choice", "required"),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [10**6]),
        ("metadata", {"a": 1}),
        ("n", []),
    ],
)
def test_a_wrong_field_is_400_and_named(app: Any, name: str, value: Any) -> None:
    status, param = field(app, **{name: value})
    assert status == 400
    assert (param or "").startswith(name)


def test_places_within_messages_are_named(app: Any) -> None:
    assert field(app, messages=[{"role": "user"}]) == (400, "messages[0].content")
    assert field(app, messages=[{"role": "robot", "content": ""}]) == (400, "messages[0].role")
    audio = [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]
    assert field(app, messages=[{"role": "user", "content": audio}]) == (400, "messages[0].content[0].type")
    call_ = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}
    turns = [{"role": "assistant", "tool_calls": [call_]}]
    assert field(app, messages=turns) == (400, "messages[0].tool_calls[0].function.arguments")
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert field(app, tools=tools) == (400, "tools")  # this renderer reads no tool calls


def test_neutral_and_ignored_fields_pass_and_are_told(app: Any) -> None:
    answer = post(app, {**CHAT, "presence_penalty": 0, "logit_bias": {}, "store": True, "service_tier": "auto"})
    assert answer.status_code == 200
    assert answer.headers["x-ignored-fields"] == "service_tier, store"


def test_a_clients_own_answer_may_be_sent_back(app: Any, store: FeedbackStore) -> None:
    first = post(app, CHAT).json()["choices"][0]["message"]
    parts = [{"type": "text", "text": "go "}, {"type": "text", "text": "on"}]
    answer = post(app, {**CHAT, "messages": [*CHAT["messages"], first, {"role": "user", "content": parts}]})
    assert answer.status_code == 200
    logged = store.interaction(answer.json()["id"])
    assert [message.content for message in logged.messages] == ["hi", "echo", "go on"]


NO_REQUESTS = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"x"',
    b"\xff\xfe",
    b'{"model": NaN}',
    b'{"temperature": NaN, "model": "tiny"}',
    b'{"a":' * 5000 + b"1" + b"}" * 5000,
    b"[" * 100_000,
    b'{"model": "\\ud800"}',
    b'{"temperature": 1e999}',
    b'{"model":"tiny","messages":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/feedback"])
def test_bodies_that_are_no_requests(app: Any, path: str) -> None:
    async def talk(client: httpx.AsyncClient) -> None:
        for body in NO_REQUESTS:
            answer = await client.post(path, content=body, headers=KEY)
            assert answer.status_code == 400, body[:40]
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    call(app, talk)


def test_large_bodies_are_413(model: serve.ServedModel) -> None:
    app = serve.create_app({"tiny": model}, max_body_bytes=1000)
    assert post(app, {**CHAT, "user": "x" * 2000}).status_code == 413
    assert post(app, {**CHAT, "user": "x" * 20_000}).status_code == 413
    assert post(app, CHAT).status_code == 200


def test_bodies_that_do_not_come_are_408(model: serve.ServedModel) -> None:
    async def drip() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)

    app = serve.create_app({"tiny": model}, read_timeout_s=0.05)
    assert send(app, "POST", "/v1/completions", content=drip()).status_code == 408


def test_unknown_paths_and_methods(app: Any) -> None:
    assert send(app, "GET", "/v1/embeddings", headers=KEY).json()["error"]["type"] == "not_found_error"
    answer = send(app, "GET", "/v1/chat/completions", headers=KEY)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert send(app, "GET", "/v1/models/none", headers=KEY).status_code == 404


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = (
    "model messages prompt max_tokens max_completion_tokens temperature top_p top_k min_p n stop seed stream "
    "stream_options logprobs top_logprobs user tools tool_choice metadata return_token_ids stop_token_ids ignore_eos "
    "response_format completion_id choice thumb rating preferred rejected correction label comment source"
).split()
SOUND = st.sampled_from([CHAT, {"model": "tiny", "prompt": "x"}, {"completion_id": "c", "thumb": True}, {}])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sound=SOUND,
    change=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4),
    path=st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/feedback"]),
)
@example(sound=CHAT, change={"messages": [{"role": "user", "content": "\x00"}]}, path="/v1/chat/completions")
@example(sound={"model": "tiny", "prompt": []}, change={}, path="/v1/completions")
@example(sound={"model": "tiny", "prompt": [[]]}, change={}, path="/v1/completions")
@example(sound={"model": "tiny", "prompt": [True]}, change={}, path="/v1/completions")
@example(sound={"model": "tiny", "prompt": [10**30]}, change={}, path="/v1/completions")
@example(sound={"model": "tiny", "prompt": ""}, change={}, path="/v1/completions")
def test_no_body_is_a_server_error(app: Any, sound: dict[str, Any], change: dict[str, Any], path: str) -> None:
    answer = send(app, "POST", path, content=json.dumps({**sound, **change}).encode(), headers=KEY)
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.json()["error"]["message"]


def test_metrics_tell_what_happened(app: Any) -> None:
    post(app, CHAT)
    post(app, {**CHAT, "stream": True})
    post(app, {**CHAT, "n": "x"})
    lines = send(app, "GET", "/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    prompt = len("<user>hi<assistant>")
    assert values['posttrain:prompt_tokens_total{model_name="tiny"}'] == str(2 * prompt)
    assert values['posttrain:generation_tokens_total{model_name="tiny"}'] == "8"
    assert values['posttrain:request_success_total{finished_reason="length",model_name="tiny"}'] == "2"
    assert values['posttrain:time_to_first_token_seconds_count{model_name="tiny"}'] == "2"
    assert values['posttrain:inter_token_latency_seconds_count{model_name="tiny"}'] == "6"
    assert values['posttrain:e2e_request_latency_seconds_bucket{model_name="tiny",le="+Inf"}'] == "2"
    assert values['posttrain:http_responses_total{path="/v1/chat/completions",status="200"}'] == "2"
    assert values['posttrain:http_responses_total{path="/v1/chat/completions",status="400"}'] == "1"
    assert values['posttrain:num_requests_running{model_name="tiny"}'] == "0"
    assert values["posttrain:interactions_logged_total"] == "2"
    heads = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(heads) == len(set(heads))


def test_a_store_that_fails_does_not_take_the_answer_with_it(model: serve.ServedModel, caplog: Any) -> None:
    class Broken:
        def log_many(self, interactions: list[Interaction]) -> int:
            raise OSError("disk full")

    app = serve.create_app({"tiny": model}, store=Broken())
    assert post(app, CHAT).status_code == 200
    assert "posttrain:interactions_lost_total 1" in send(app, "GET", "/metrics").text
    assert "disk full" in caplog.text


def test_what_nobody_foresaw_is_a_bare_500(model: serve.ServedModel, caplog: Any) -> None:
    class Source:
        def models(self) -> dict[str, serve.ServedModel]:
            raise RuntimeError("secret inside")

    answer = send(serve.create_app(Source()), "GET", "/v1/models")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
    assert "secret inside" in caplog.text


def test_an_administrator_swaps_models(model: serve.ServedModel, store: FeedbackStore) -> None:
    class Champions(serve.ModelTable):
        def swap(self, name: str, card_id: str | None) -> serve.ServedModel:
            if card_id == "broken":
                raise ModelError("weights are missing")
            new = replace(model, card_id=card_id or "champion-7")
            self.put(new)
            return new

    app = serve.create_app(Champions([model]), store=store, admin_keys=["root"])
    root = {"Authorization": "Bearer root"}
    swap = "/admin/models/tiny/swap"
    assert send(app, "POST", swap).status_code == 401
    assert send(app, "POST", swap, headers=root).json()["card_id"] == "champion-7"
    assert post(app, {"card_id": "card-9"}, swap, root).json()["card_id"] == "card-9"
    refused = post(app, {"card_id": "broken"}, swap, root)
    assert (refused.status_code, "weights are missing" in refused.text) == (409, True)
    assert store.interaction(post(app, CHAT).json()["id"]).model == "card-9"
    assert post(app, {"card": "x"}, swap, root).status_code == 400
    assert post(app, {}, "/admin/models/none/swap", root).status_code == 404
    fixed = serve.create_app({"tiny": model}, admin_keys=["root"])
    assert post(fixed, {}, swap, root).json()["error"]["code"] == "fixed_models"


def test_a_model_table_swaps_between_requests(model: serve.ServedModel, store: FeedbackStore) -> None:
    table = serve.ModelTable([model])
    app = serve.create_app(table, store=store)
    first = post(app, CHAT).json()["id"]
    assert table.put(replace(model, card_id="card-2")) is model
    second = post(app, CHAT).json()["id"]
    assert [store.interaction(i).model for i in (first, second)] == ["card-1", "card-2"]
    table.remove("tiny")
    assert post(app, CHAT).status_code == 404
    assert send(app, "GET", "/ready").status_code == 503
    with pytest.raises(ServeError, match="no model 'tiny'"):
        table.remove("tiny")
