"""The local scorer: what waits together shares a row, failures stay with their item, one score whatever the company."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
import torch

from posttrain.core import ConfigError, EngineError, Task
from posttrain.engine import Encoded, LocalScorer
from posttrain.models import Decoder, DecoderConfig, ScoredDecoder

TEXTS = ["abc", "a", "hello there", "xyz" * 6, "abca"]


def task(prompt: str = "q") -> Task:
    return Task(id="t", prompt=prompt)


def encode(items: Sequence[tuple[Task, str]]) -> list[Encoded | Exception]:
    """Bytes; judged at the last; "!" is refused."""
    found: list[Encoded | Exception] = []
    for each, answer in items:
        tokens = tuple(f"{each.prompt}{answer}".encode())
        found.append(ValueError("refused") if "!" in answer else Encoded(tokens, (len(tokens) - 1,)))
    return found


@pytest.fixture
def model() -> ScoredDecoder:
    config = DecoderConfig(
        vocab_size=128,
        width=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_width=24,
        max_positions=32,
        init_std=0.2,
    )
    return ScoredDecoder(Decoder.random(config, seed=1), seed=2)


def alone(model: ScoredDecoder, text: str) -> float:
    with torch.no_grad():
        return model(torch.tensor([list(f"q{text}".encode())]))[0, -1].item()


def together(scorer: LocalScorer, texts: Sequence[str]) -> list[tuple[float, ...] | Exception]:
    async def ask() -> list[tuple[float, ...] | Exception]:
        found = await asyncio.gather(*(scorer.score([(task(), text)]) for text in texts))
        return [each[0] for each in found]

    return asyncio.run(ask())


@pytest.mark.parametrize("inline", [False, True])
def test_callers_share_rows_and_get_their_own_scores(model: ScoredDecoder, inline: bool) -> None:
    scorer = LocalScorer(model, encode, inline=inline)
    found = together(scorer, TEXTS)
    assert scorer.num_batches == 1
    assert [each[0] for each in found] == pytest.approx([alone(model, text) for text in TEXTS], abs=1e-5)
    again = together(scorer, TEXTS[:2])  # in another event loop
    assert [each[0] for each in again] == pytest.approx([each[0] for each in found[:2]], abs=1e-5)


def test_rows_hold_what_fits(model: ScoredDecoder) -> None:
    scorer = LocalScorer(model, encode, batch_tokens=16)
    found = scorer.score_now([(task(), text) for text in TEXTS])
    assert scorer.num_batches == 3  # 19 alone, 12, then 5 + 4 + 2
    assert [each[0] for each in found] == pytest.approx([alone(model, text) for text in TEXTS], abs=1e-5)


def test_several_places_are_judged_in_one_pass(model: ScoredDecoder) -> None:
    tokens = tuple(b"qabcabc")
    (found,) = LocalScorer(model, encode).score_tokens([Encoded(tokens, (1, 3, 6))])
    assert found == pytest.approx([alone(model, text) for text in ("a", "abc", "abcabc")], abs=1e-5)


def test_failures_stay_with_their_item(model: ScoredDecoder) -> None:
    found = together(LocalScorer(model, encode), ["ab", "no!", "x" * 40, "cd"])
    assert isinstance(found[1], ValueError)
    assert "41 tokens, but the reward model has 32 positions" in str(found[2])
    assert [found[0][0], found[3][0]] == pytest.approx([alone(model, "ab"), alone(model, "cd")], abs=1e-5)
    odd = LocalScorer(model, lambda items: [Encoded((200,), (0,)), Encoded((1,), ()), Encoded((1,), (3,))])
    problems = odd.score_now([(task(), "")] * 3)
    assert "vocabulary of 128" in str(problems[0])
    assert "nothing to judge" in str(problems[1])
    assert "nothing to judge" in str(problems[2])
    with torch.no_grad():
        model.score.weight.fill_(torch.nan)
    (lost,) = together(LocalScorer(model, encode), ["ab"])
    assert isinstance(lost, EngineError)


def test_a_model_that_breaks_fails_those_that_wait(model: ScoredDecoder) -> None:
    def broken(items: Sequence[tuple[Task, str]]) -> list[Encoded | Exception]:
        raise RuntimeError("out of memory")

    found = together(LocalScorer(model, broken), ["a", "b"])
    assert all("RuntimeError: out of memory" in str(each) for each in found)


def test_who_gives_up_holds_up_nobody(model: ScoredDecoder) -> None:
    scorer = LocalScorer(model, encode, wait_s=0.05)

    async def ask() -> tuple[float, ...] | Exception:
        hasty = asyncio.ensure_future(scorer.score([(task(), "abc")]))
        patient = asyncio.ensure_future(scorer.score([(task(), "a")]))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(hasty, 0.01)
        return (await patient)[0]

    assert asyncio.run(ask()) == pytest.approx((alone(model, "a"),), abs=1e-5)


def test_nothing_asked_nothing_answered(model: ScoredDecoder) -> None:
    assert asyncio.run(LocalScorer(model, encode).score([])) == []
    with pytest.raises(ConfigError, match="batch_tokens must be above 0"):
        LocalScorer(model, encode, batch_tokens=0)


def test_products_in_bf16_keep_the_head_in_fp32(model: ScoredDecoder) -> None:
    found = LocalScorer(model, encode, dtype=torch.bfloat16).score_now([(task(), text) for text in TEXTS])
    values = [each[0] for each in found]
    assert values == pytest.approx([alone(model, text) for text in TEXTS], abs=0.2)
    assert any(value != torch.tensor(value).bfloat16().item() for value in values)
