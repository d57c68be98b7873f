"""Sampling maths: distributions, truncation by hand, determinism, broken rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from posttrain.engine.sampling import RowSampling, sample
from posttrain.engine.uniforms import uniforms


def rows(
    num: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    top: int = 0,
    vocab: int,
) -> RowSampling:
    return RowSampling.of(
        torch.full((num,), temperature, dtype=torch.float64),
        torch.full((num,), top_k),
        torch.full((num,), top_p, dtype=torch.float64),
        torch.full((num,), min_p, dtype=torch.float64),
        top,
        vocab,
    )


def expected(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The truncated distribution, one token after another, the slow and plain way."""
    probs = torch.softmax(logits.double() / temperature, -1).tolist()
    order = sorted(range(len(probs)), key=lambda token: -probs[token])
    kept = order[: top_k or len(order)]
    mass = sum(probs[token] for token in kept)
    nucleus, running = [], 0.0
    for token in kept:
        if nucleus and running >= top_p * mass and top_p < 1:
            break
        nucleus.append(token)
        running += probs[token]
    final = [token for token in nucleus if probs[token] >= min_p * probs[order[0]]]
    out = np.zeros(len(probs))
    for token in final:
        out[token] = probs[token]
    return out / out.sum()


CASES = [
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 0.7, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 1.5, "top_k": 7, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 1.0, "top_k": 0, "top_p": 0.6, "min_p": 0.0},
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.2},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.8, "min_p": 0.1},
]


@pytest.mark.parametrize("vocab", [23, 700])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_match_the_distribution(case: dict[str, float], vocab: int) -> None:
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(3)) * 1.5
    num = 20_000 if vocab < 100 else 5_000
    draws = torch.from_numpy(uniforms(np.full(num, 11, dtype=np.uint64), np.arange(num)))
    drawn = sample(logits.expand(num, vocab), draws, rows(num, vocab=vocab, **case))
    probs = expected(logits, **case)
    counts = np.bincount(drawn.tokens_N.numpy(), minlength=vocab)
    assert counts[probs == 0].sum() == 0
    common = probs * num >= 5
    seen = [*counts[common], counts[~common].sum()]
    wanted = [*(probs[common] * num), probs[~common].sum() * num]
    if wanted[-1] < 5:
        seen, wanted = seen[:-1], wanted[:-1]
        wanted = [count * sum(seen) / sum(wanted) for count in wanted]
    assert stats.chisquare(seen, wanted).pvalue > 1e-4
    np.testing.assert_allclose(drawn.logprobs_N.numpy(), np.log(probs[drawn.tokens_N.numpy()]), atol=2e-5)
    policy = torch.log_softmax(logits.double(), -1)[drawn.tokens_N]
    np.testing.assert_allclose(drawn.policy_logprobs_N.numpy(), policy.numpy(), atol=2e-5)


def test_truncation_by_hand() -> None:
    """Probabilities 0.5, 0.3, 0.15, 0.05 in the order of ids 2, 0, 3, 1."""
    probs = torch.tensor([0.3, 0.05, 0.5, 0.15])
    logits = probs.log()
    for settings, kept in [
        ({"top_k": 2}, {2: 0.625, 0: 0.375}),
        ({"top_p": 0.49}, {2: 1.0}),
        ({"top_p": 0.51}, {2: 0.625, 0: 0.375}),
        ({"top_p": 0.79}, {2: 0.625, 0: 0.375}),
        ({"min_p": 0.29}, {2: 10 / 19, 0: 6 / 19, 3: 3 / 19}),
        ({"top_k": 3, "top_p": 0.53}, {2: 0.625, 0: 0.375}),  # 0.5 of a mass of 0.95 is 0.526: one more is needed
        ({"top_k": 1, "top_p": 0.1, "min_p": 1.0}, {2: 1.0}),
    ]:
        num = 64
        draws = torch.arange(num, dtype=torch.float64) / num
        drawn = sample(logits.expand(num, 4), draws, rows(num, vocab=4, **settings))
        assert set(drawn.tokens_N.tolist()) == set(kept), settings
        for token, logprob in zip(drawn.tokens_N.tolist(), drawn.logprobs_N.tolist(), strict=True):
            assert math.exp(logprob) == pytest.approx(kept[token], abs=1e-6)


def test_a_wide_nucleus_falls_back_to_the_whole_vocabulary() -> None:
    logits = torch.zeros(1000)
    num = 5000
    draws = torch.from_numpy(uniforms(np.full(num, 5, dtype=np.uint64), np.arange(num)))
    drawn = sample(logits.expand(num, 1000), draws, rows(num, vocab=1000, top_p=0.8995))
    assert len(set(drawn.tokens_N.tolist())) > 800
    assert set(drawn.tokens_N.tolist()) <= set(range(900))  # equal probabilities: the lower ids are kept


def test_rows_of_one_batch_differ() -> None:
    vocab, num = 50, 8
    logits = torch.randn(num, vocab, generator=torch.Generator().manual_seed(1))
    settings = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.5, "top_k": 3},
        {"top_p": 0.3},
        {"min_p": 0.5},
        {"temperature": 2.0, "top_p": 0.9, "top_k": 40},
        {"temperature": 0.0, "top_k": 3},
        {"temperature": 0.7},
    ]
    full = [{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **row} for row in settings]
    columns = [torch.tensor([row[name] for row in full]) for name in ("temperature", "top_k", "top_p", "min_p")]
    draws = torch.from_numpy(uniforms(np.arange(num, dtype=np.uint64), np.zeros(num, dtype=np.int64)))
    together = sample(logits, draws, RowSampling.of(*columns, 0, vocab))
    for place, row in enumerate(full):
        alone = sample(logits[place : place + 1], draws[place : place + 1], rows(1, vocab=vocab, **row))
        assert alone.tokens_N[0] == together.tokens_N[place]
        assert alone.logprobs_N[0] == together.logprobs_N[place]


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    drawn = sample(logits, torch.tensor([0.9, 0.9], dtype=torch.float64), rows(2, temperature=0.0, vocab=4))
    assert drawn.tokens_N.tolist() == [1, 0]
    assert drawn.logprobs_N.tolist() == [0.0, 0.0]
    assert drawn.policy_logprobs_N[1].item() == pytest.approx(math.log(0.25))


def test_the_last_number_below_one_never_draws_an_impossible_token() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf, -math.inf]])
    for draw in (0.0, 0.5, 1 - 2.0**-52):
        drawn = sample(logits, torch.tensor([draw], dtype=torch.float64), rows(1, vocab=4))
        assert drawn.tokens_N.item() in (0, 1)
        assert drawn.logprobs_N.item() == pytest.approx(math.log(0.5))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_p": 0.5}, {"temperature": 0.3, "top_k": 2}])
def test_a_broken_row_is_marked_and_harms_nobody(poison: float, settings: dict[str, float]) -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    draws = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    clean = sample(logits, draws, rows(3, vocab=40, **settings))
    logits[1, 7] = poison
    broken = sample(logits, draws, rows(3, vocab=40, **settings))
    assert broken.valid_N.tolist() == [True, False, True]
    for place in (0, 2):
        assert broken.tokens_N[place] == clean.tokens_N[place]
        assert broken.logprobs_N[place] == clean.logprobs_N[place]


def test_top_logprobs_are_the_policys() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    drawn = sample(logits, torch.tensor([0.2], dtype=torch.float64), rows(1, temperature=0.5, top=2, vocab=4))
    assert drawn.top_ids_NK is not None
    assert drawn.top_logprobs_NK is not None
    assert drawn.top_ids_NK.tolist() == [[1, 2]]
    want = torch.log_softmax(logits, -1)[0, [1, 2]]
    torch.testing.assert_close(drawn.top_logprobs_NK[0], want)


def test_uniforms_are_splitmix64_by_position() -> None:
    # The first outputs of SplitMix64 seeded with 1234567, as published with the algorithm.
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    got = uniforms(np.full(5, 1234567, dtype=np.uint64), np.arange(5))
    assert got.tolist() == [(number >> 12) / 2**52 for number in known]


def test_uniforms_are_uniform_over_seeds_and_over_positions() -> None:
    num = 50_000
    by_position = uniforms(np.full(num, 9, dtype=np.uint64), np.arange(num))
    by_seed = uniforms(np.arange(num, dtype=np.uint64), np.zeros(num, dtype=np.int64))
    for draws in (by_position, by_seed):
        assert stats.kstest(draws, "uniform").pvalue > 1e-4
        assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.02
