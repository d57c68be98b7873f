"""The house's own engine and renderer behind the API, on a tiny random model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from posttrain import engine, models, render, serve
from posttrain.core import SampleRequest, Sampling, StopReason, user
from posttrain.feedback import FeedbackStore

MESSAGES = [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def tokenizer() -> render.Tokenizer:
    texts = ["Say something.", "The quick brown fox jumps over the lazy dog.", "user assistant system"] * 3
    return render.Tokenizer.train_bpe(texts, vocab_size=300)


@pytest.fixture(scope="module")
def local(tokenizer: render.Tokenizer) -> Iterator[engine.LocalEngine]:
    config = models.DecoderConfig(
        vocab_size=300,
        width=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        mlp_width=64,
        max_positions=2048,
        init_std=0.2,
    )
    with engine.LocalEngine(models.Decoder.random(config), tokenizer, max_batch=4) as running:
        yield running


@pytest.fixture
def client(local: engine.LocalEngine, tokenizer: render.Tokenizer, store: FeedbackStore) -> Iterator[openai.OpenAI]:
    model = serve.ServedModel(name="tiny", engine=local, renderer=render.Renderer(tokenizer))
    server = serve.Server(serve.create_app({"tiny": model}, store=store)).start()
    with server, openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0) as opened:
        yield opened


def test_the_api_gives_what_the_engine_gives(
    client: openai.OpenAI, local: engine.LocalEngine, tokenizer: render.Tokenizer, store: FeedbackStore
) -> None:
    renderer = render.Renderer(tokenizer)
    prompt = renderer.prompt([user("Say something.")])
    stops = tuple(sorted(renderer.stop_tokens))
    for seed in range(3):
        sampling = Sampling(max_tokens=24, seed=seed, n=2, temperature=0.8, stop_tokens=stops, top_logprobs=2)
        direct = asyncio.run(local.sample([SampleRequest(prompt=prompt, sampling=sampling)]))[0]
        asked = {"model": "tiny", "messages": MESSAGES, "seed": seed, "n": 2, "temperature": 0.8, "max_tokens": 24}
        answer = client.chat.completions.create(
            **asked, logprobs=True, top_logprobs=2, extra_body={"return_token_ids": True}
        )
        logged = store.choices(answer.id)
        for choice, completion, interaction in zip(answer.choices, direct, logged, strict=True):
            assert choice.message.content == completion.text == interaction.text
            assert tuple(choice.token_ids) == completion.tokens == interaction.tokens
            assert interaction.logprobs == pytest.approx(completion.logprobs, abs=1e-4)
            own = [token.logprob for token in choice.logprobs.content]
            assert own == pytest.approx(completion.policy_logprobs, abs=1e-4)
            assert len(choice.logprobs.content[0].top_logprobs) == 2
            assert interaction.prompt_tokens == prompt
        texts = {0: "", 1: ""}
        for chunk in client.chat.completions.create(**asked, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert [texts[0], texts[1]] == [completion.text for completion in direct]


def test_leaving_frees_the_engines_slots(
    client: openai.OpenAI, local: engine.LocalEngine, store: FeedbackStore
) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "n": 4, "max_tokens": 1900, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{client.base_url}chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        for _ in range(12):
            next(lines)
        assert local.stats().num_running == 4
    deadline = time.monotonic() + 5
    while local.stats().num_running or store.counts().interactions < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for interaction in store.interactions().items:
        assert interaction.stop_reason is StopReason.CANCELLED
        assert 0 < len(interaction.tokens) == len(interaction.logprobs) < 1900


def test_what_does_not_fit_is_refused(client: openai.OpenAI, store: FeedbackStore) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=5000)
    assert refused.value.code == "context_length_exceeded"
    assert client.models.retrieve("tiny").max_model_len == 2048
    assert store.counts().interactions == 0


def test_a_scripted_engine_serves_too(tokenizer: render.Tokenizer, store: FeedbackStore) -> None:
    scripted = engine.ScriptedEngine(lambda request: ["one", "two"], tokenizer)
    model = serve.ServedModel(
        name="script", engine=serve.WholeAnswers(scripted), renderer=render.Renderer(tokenizer), card_id="s-1"
    )
    with serve.Server(serve.create_app({"script": model}, store=store)) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0)
        answer = client.chat.completions.create(model="script", messages=MESSAGES, n=2)
        assert [choice.message.content for choice in answer.choices] == ["one", "two"]
        chunks = client.chat.completions.create(model="script", messages=MESSAGES, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one"
