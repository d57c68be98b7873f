"""The official client against a running server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from posttrain import serve
from posttrain.core import StopReason
from posttrain.feedback import FeedbackStore


@pytest.fixture
def client(server: serve.Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="key-a", max_retries=0) as opened:
        yield opened


HELLO = [{"role": "user", "content": "hello"}]
ANSWER = "echo <user>hello<assistant>"


def test_chat_answers_with_usage_and_is_logged(client: openai.OpenAI, store: FeedbackStore) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, user="u1", metadata={"page": "7"})
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len("<user>hello<assistant>")
    assert answer.usage.completion_tokens == len(ANSWER) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    logged = store.interaction(answer.id)
    assert logged.text == ANSWER
    assert logged.tokens == (*map(ord, ANSWER), 0)
    assert logged.logprobs == (-0.5,) * (len(ANSWER) + 1)
    assert logged.prompt == "<user>hello<assistant>"
    assert logged.prompt_tokens == tuple(map(ord, "<user>hello<assistant>"))
    assert (logged.model, logged.model_name, logged.weight_version, logged.user) == ("card-1", "tiny", 3, "u1")
    assert logged.stop_reason is StopReason.EOS
    assert logged.messages[0].content == "hello"
    assert logged.metadata["request"] == {"page": "7"}


def test_chat_stream_gives_the_same_text_role_finish_and_usage(client: openai.OpenAI, store: FeedbackStore) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=HELLO, stream=True, n=2, stream_options={"include_usage": True}
        )
    )
    texts = {0: "", 1: ""}
    finished = {}
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            finished[choice.index] = choice.finish_reason
    assert texts == {0: ANSWER, 1: ANSWER + "1"}
    assert finished == {0: "stop", 1: "stop"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 2 * len(ANSWER) + 3
    assert [logged.text for logged in store.choices(chunks[0].id)] == [ANSWER, ANSWER + "1"]


def test_n_stop_max_tokens_and_sampling_reach_the_engine(client: openai.OpenAI, engine) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        n=3,
        stop=["<assis"],
        temperature=0.5,
        top_p=0.9,
        seed=7,
        max_completion_tokens=99,
        extra_body={"top_k": 5, "min_p": 0.1, "return_token_ids": True},
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {"echo <user>hello"}
    sampling = engine.requests[-1].sampling
    assert (sampling.n, sampling.temperature, sampling.top_p, sampling.seed) == (3, 0.5, 0.9, 7)
    assert (sampling.top_k, sampling.min_p, sampling.max_tokens, sampling.stop_tokens) == (5, 0.1, 99, (0,))
    assert answer.choices[0].token_ids == list(map(ord, "echo <user>hello<assis"))
    assert answer.prompt_token_ids == list(map(ord, "<user>hello<assistant>"))
    clipped = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4)
    assert (clipped.choices[0].message.content, clipped.choices[0].finish_reason) == ("echo", "length")


def test_chat_logprobs_are_the_models_own(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=2, logprobs=True, top_logprobs=2, temperature=0.3
    )
    first, second = answer.choices[0].logprobs.content
    assert (first.token, first.logprob, first.bytes) == ("e", -0.25, [101])
    assert [(top.token, top.logprob) for top in second.top_logprobs] == [("c", -0.25), ("z", -2.0)]
    assert client.chat.completions.create(model="tiny", messages=HELLO).choices[0].logprobs is None
    chunks = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=3, logprobs=True, stream=True)
    streamed = [
        token.token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content
    ]
    assert streamed == ["e", "c", "h"]


def test_completions_take_text_texts_and_token_ids(client: openai.OpenAI, store: FeedbackStore) -> None:
    one = client.completions.create(model="tiny", prompt="abc", max_tokens=50)
    assert one.choices[0].text == "echo abc"
    ids = client.completions.create(model="tiny", prompt=[97, 98], max_tokens=50)
    assert ids.choices[0].text == "echo ab"
    many = client.completions.create(model="tiny", prompt=["x", "y"], n=2, max_tokens=50, seed=1)
    assert [choice.text for choice in many.choices] == ["echo x", "echo x1", "echo y", "echo y1"]
    assert many.usage.prompt_tokens == 2
    assert [logged.prompt for logged in store.choices(many.id)] == ["x", "x", "y", "y"]
    assert client.completions.create(model="tiny", prompt=[[97], [98]]).choices[1].text == "echo b"
    chunks = list(client.completions.create(model="tiny", prompt=["x", "y"], stream=True, max_tokens=50))
    for index, text in enumerate(("echo x", "echo y")):
        assert "".join(c.choices[0].text for c in chunks if c.choices[0].index == index) == text


def test_completions_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="abc", max_tokens=3, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == ["e", "c", "h"]
    assert logprobs.token_logprobs == [-0.25] * 3
    assert logprobs.top_logprobs[0] == {"e": -0.25}
    assert logprobs.text_offset == [0, 1, 2]


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").card_id == "card-1"


def test_errors_raise_the_clients_own_classes(client: openai.OpenAI, server: serve.Server, engine) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="other", messages=HELLO)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="tiny", messages=HELLO, temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.chat.completions.create(model="tiny", messages=HELLO, response_format={"type": "json_object"})
    assert unsupported.value.param == "response_format"
    image = [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]
    with pytest.raises(openai.BadRequestError, match="image_url"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": image}])
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="template refuses"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "no template"}])
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0).models.list()
    engine.raises = RuntimeError("secret inside")
    with pytest.raises(openai.InternalServerError) as failed:
        client.chat.completions.create(model="tiny", messages=HELLO)
    assert "secret" not in str(failed.value)


def test_an_engine_that_fails_within_a_stream_tells_so(client: openai.OpenAI, engine, store: FeedbackStore) -> None:
    def answer(prompt: str) -> str:
        raise RuntimeError("secret inside")

    engine.answer = answer
    with pytest.raises(openai.APIError):
        list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))
    (logged,) = store.interactions().items
    assert logged.stop_reason is StopReason.ERROR
    assert "secret inside" in logged.metadata["error"]  # kept for the operator


def test_fifty_concurrent_requests_are_each_logged_once(server: serve.Server, store: FeedbackStore, engine) -> None:
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="key-a", max_retries=0) as client:

            async def ask(number: int) -> str:
                messages = [{"role": "user", "content": f"q{number}"}]
                if number % 2:
                    return (await client.chat.completions.create(model="tiny", messages=messages)).id
                stream = await client.chat.completions.create(model="tiny", messages=messages, stream=True)
                return [chunk.id async for chunk in stream][-1]

            return await asyncio.gather(*map(ask, range(50)))

    engine.step_s = 0.001
    ids = asyncio.run(ask_all())
    logged = store.interactions().items
    assert len(set(ids)) == 50
    assert sorted(ids) == sorted(interaction.id for interaction in logged)
    assert sorted(i.messages[0].content for i in logged) == sorted(f"q{number}" for number in range(50))
    assert engine.peak > 10


def _wait_for(holds, timeout_s: float = 5.0) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_places_and_is_logged(
    server: serve.Server, store: FeedbackStore, engine, stream: bool
) -> None:
    engine.step_s, engine.answer = 0.01, lambda prompt: "x" * 3000
    body = {"model": "tiny", "messages": HELLO, "stream": stream, "n": 2, "max_tokens": 3000}
    headers = {"Authorization": "Bearer key-a"}
    with httpx.Client() as client:
        if stream:
            with client.stream("POST", server.url + "/v1/chat/completions", json=body, headers=headers) as answer:
                lines = answer.iter_lines()
                assert all(line == "" or line.startswith("data: ") for _, line in zip(range(20), lines, strict=False))
                assert engine.running == 2
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(server.url + "/v1/chat/completions", json=body, headers=headers, timeout=0.3)
    _wait_for(lambda: engine.running == 0 and store.counts().interactions == 2)
    for logged in store.interactions().items:
        assert logged.stop_reason is StopReason.CANCELLED
        assert 0 < len(logged.tokens) < 1000
        assert logged.text == "x" * len(logged.tokens)
        assert len(logged.logprobs) == len(logged.tokens)


def test_a_full_queue_answers_429_with_retry_after(model: serve.ServedModel, engine) -> None:
    engine.step_s = 0.05
    app = serve.create_app({"tiny": model}, max_pending=2)
    with serve.Server(app) as server, httpx.Client(base_url=server.url) as client:
        body = {"model": "tiny", "messages": HELLO, "stream": True, "n": 2}
        with client.stream("POST", "/v1/chat/completions", json=body) as first:
            lines = first.iter_lines()
            next(lines)
            refused = httpx.post(server.url + "/v1/chat/completions", json=body)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        _wait_for(lambda: engine.running == 0)
        assert client.post("/v1/chat/completions", json={**body, "stream": False}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_takes_too_long_ends_as_timeout(
    model: serve.ServedModel, store: FeedbackStore, engine, stream: bool
) -> None:
    engine.step_s, engine.answer = 0.02, lambda prompt: "x" * 3000
    app = serve.create_app({"tiny": model}, store=store, request_timeout_s=0.2)
    body = {"model": "tiny", "messages": HELLO, "stream": stream, "max_tokens": 3000}
    with serve.Server(app) as server:
        answer = httpx.post(server.url + "/v1/chat/completions", json=body)
    assert "not finished after 0.2 s" in answer.text
    assert answer.status_code == (200 if stream else 504)
    assert engine.running == 0
    (logged,) = store.interactions().items
    assert logged.stop_reason is StopReason.TIMEOUT
    assert logged.text.startswith("x")
