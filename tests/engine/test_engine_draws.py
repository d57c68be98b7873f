"""Tokens drawn by the compiled pass: against PyTorch's sampling, whoever goes along, shared prompts, broken rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from posttrain.engine.blocks import BLOCK, BlockCache, BlockShape, KeyStore
from posttrain.engine.compiled import CompiledDecoder, fits
from posttrain.engine.draws import Draws
from posttrain.engine.huge import Arena, huge_zeros
from posttrain.engine.sampling import RowSampling, sample
from posttrain.models import Decoder, DecoderConfig

SHAPE: dict[str, Any] = {
    "width": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "mlp_width": 90,
    "max_positions": 512,
}
HOWS: list[dict[str, float]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 7, "temperature": 1.3},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"top_p": 1e-9},
    {"min_p": 0.3},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.05, "temperature": 1.4},
    {"top_p": 0.9, "min_p": 1.0},
]
COLUMNS = ("temperature", "top_k", "top_p", "min_p")
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def make(vocab: int, scale: float = 4.0) -> CompiledDecoder:
    config = DecoderConfig(vocab_size=vocab, **SHAPE)
    if not fits(config, torch.bfloat16, torch.device("cpu")):
        pytest.skip("no compiler or no AVX-512 bf16 on this machine")
    model = Decoder.random(config, 0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(scale)
    return CompiledDecoder(model.cast(torch.bfloat16).requires_grad_(False), 256)


def set_columns(draws: Draws, hows: list[dict[str, float]], seed: int = 0) -> dict[str, Tensor]:
    """Put rows' settings into the columns; the same as tensors."""
    full = [{**PLAIN, **how} for how in hows]
    table = np.zeros(len(full), dtype=[(name, np.int64 if name == "top_k" else np.float64) for name in COLUMNS])
    for name in COLUMNS:
        table[name] = [how[name] for how in full]
    draws.set(table)
    draws.columns["uniforms"][: len(full)] = np.random.default_rng(seed).random(len(full))
    return {name: torch.from_numpy(table[name].copy()) for name in COLUMNS}


@pytest.mark.parametrize(("vocab", "spread"), [(203, 3.0), (5000, 3.0), (5000, 0.05), (131, 30.0)])
def test_tokens_and_logprobs_are_those_of_sampling_with_pytorch(vocab: int, spread: float) -> None:
    compiled = make(vocab)
    hows = HOWS * 12
    logits = torch.randn(len(hows), vocab, generator=torch.Generator().manual_seed(vocab)) * spread
    logits[5, 3:90] = -math.inf
    logits[7] = logits[7].round()  # many ties
    draws = compiled.draws(len(hows))
    columns = set_columns(draws, hows)
    compiled.draw(list(logits), draws)
    ours = draws.drawn(len(hows))
    how = RowSampling.of(*(columns[name] for name in COLUMNS), 0, vocab)
    theirs = sample(logits, torch.from_numpy(draws.columns["uniforms"]), how)
    tokens = torch.from_numpy(ours.tokens_N)
    same = tokens == theirs.tokens_N
    assert same.float().mean() > 0.97, "but for random numbers at the edge between two tokens"
    assert ours.valid_N.all()
    for mine, other in (
        (ours.logprobs_N, theirs.logprobs_N),
        (ours.policy_logprobs_N, theirs.policy_logprobs_N),
    ):
        torch.testing.assert_close(torch.from_numpy(mine)[same], other[same], atol=2e-5, rtol=1e-4)
    policy = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(torch.from_numpy(ours.policy_logprobs_N).double(), policy, atol=2e-5, rtol=1e-4)


def test_truncation_by_hand() -> None:
    """Probabilities 0.5, 0.25, 0.15, 0.1: top-p 0.7 keeps the first two, min-p 0.3 the first three."""
    compiled = make(203)
    logits = torch.full((203,), -math.inf)
    logits[[20, 3, 150, 9]] = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    kept = {"top_p": (0.7, [20, 3]), "min_p": (0.29, [20, 3, 150]), "top_k": (1, [20])}
    for name, (value, expected) in kept.items():
        num = 400
        draws = compiled.draws(num)
        set_columns(draws, [{name: value}] * num)
        compiled.draw([logits] * num, draws)
        drawn = draws.drawn(num)
        assert set(drawn.tokens_N.tolist()) == set(expected)
        first = float(drawn.logprobs_N[drawn.tokens_N == 20][0])
        probs = dict(zip((20, 3, 150, 9), (0.5, 0.25, 0.15, 0.1), strict=True))
        assert math.exp(first) == pytest.approx(0.5 / sum(probs[token] for token in expected), rel=1e-5)
        share = (drawn.tokens_N == 20).mean()
        assert share == pytest.approx(math.exp(first), abs=0.1)


def test_the_ends_of_the_random_numbers() -> None:
    compiled = make(5000)
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(1)) - 9
    logits[:10], logits[4990:], logits[256:512] = -math.inf, -math.inf, -math.inf
    draws = compiled.draws(5)
    set_columns(draws, [{}, {}, {"top_k": 3}, {"top_k": 3}, {"temperature": 0.0}])
    draws.columns["uniforms"][:] = [0.0, 1 - 2.0**-52, 0.0, 1 - 2.0**-52, 0.5]
    compiled.draw([logits] * 5, draws)
    order = logits.topk(3).indices.tolist()
    assert draws.drawn(5).tokens_N.tolist() == [10, 4989, order[0], order[2], order[0]]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("how", [{}, {"temperature": 0.0}, {"top_p": 0.5}])
def test_broken_logits_are_marked(poison: float, how: dict[str, float]) -> None:
    compiled = make(5000)
    logits = torch.zeros(3, 5000)
    logits[1, 4321] = poison
    draws = compiled.draws(3)
    set_columns(draws, [how] * 3)
    compiled.draw(list(logits), draws)
    assert draws.drawn(3).valid_N.tolist() == [True, False, True]


def run_step(
    compiled: CompiledDecoder, cache: BlockCache, rows: list[int], positions: list[int], hows: list[dict[str, float]]
) -> tuple[list[Any], ...]:
    """One step of some slots; what it draws, with random numbers that belong to the slot."""
    draws = compiled.draws(len(rows))
    set_columns(draws, [hows[row] for row in rows])
    draws.columns["uniforms"][: len(rows)] = np.random.default_rng(3).random(1000)[rows]
    truncated = np.array([bool({"top_k", "top_p", "min_p"} & set(hows[row])) for row in rows])
    draws.kept[: len(rows)] = np.where(truncated, np.cumsum(truncated) - 1, -1)
    slots = np.array(rows)
    at = np.array([positions[row] for row in rows])
    logits = compiled.buffer(max(1, int(truncated.sum())))
    compiled.forward(cache.places, slots + 5, slots, at, logits=logits, draws=draws)
    drawn = draws.drawn(len(rows))
    return drawn.tokens_N.tolist(), drawn.logprobs_N.tolist(), drawn.policy_logprobs_N.tolist()


@pytest.mark.parametrize("vocab", [203, 5000])
def test_neighbours_threads_and_sharing_change_no_bit(vocab: int) -> None:
    compiled = make(vocab)
    num = 45
    shape = BlockShape(num_layers=2, num_kv_heads=2, head_dim=32)
    positions = [96 + 3 * row % 60 for row in range(num)]
    hows = [HOWS[row % len(HOWS)] for row in range(num)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads, shares in ((1, False), (2, False), (2, True), (1, True)):
            torch.set_num_threads(threads)
            cache = BlockCache(shape, num, 256)
            draw = torch.Generator().manual_seed(5)
            prompts = torch.randn(num // 5, 2, 2, 3, 2, shape.elements, generator=draw).bfloat16()
            own = torch.randn(cache.slots_SLJC2E.shape, generator=draw).bfloat16()
            for slot in range(num):
                if shares:
                    cache.slots_SLJC2E[slot, :, :, :5] = own[slot, :, :, 3:]
                    place = cache.places[slot]
                    place["shared"] = prompts[slot // 5].data_ptr()
                    place["shared_capacity"] = place["num_shared"] = 3
                else:
                    cache.slots_SLJC2E[slot] = own[slot]
                    cache.slots_SLJC2E[slot, :, :, :3] = prompts[slot // 5]
            results.append(run_step(compiled, cache, list(range(num)), positions, hows))
            alone = [run_step(compiled, cache, [row], positions, hows) for row in range(0, num, 4)]
            for row, one in zip(range(0, num, 4), alone, strict=True):
                assert [column[0] for column in one] == [column[row] for column in results[-1]]
    finally:
        torch.set_num_threads(before)
    assert all(result == results[0] for result in results)


def test_large_pages_hold_what_is_put_there() -> None:
    zeros = huge_zeros([3, 1 << 20])
    assert zeros.dtype == torch.bfloat16
    assert zeros.shape == (3, 1 << 20)
    assert not zeros.any()
    arena = Arena()
    kept = [arena.keep(torch.full((size,), float(size))) for size in (5, 70_000, 9_000_000, 3)]
    assert [(len(tensor), float(tensor.sum())) for tensor in kept] == [
        (size, float(torch.full((size,), float(size)).sum())) for size in (5, 70_000, 9_000_000, 3)
    ]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in kept)


def test_a_slot_copied_out_is_its_prompt_and_what_follows() -> None:
    shape = BlockShape(num_layers=2, num_kv_heads=2, head_dim=24)
    cache = BlockCache(shape, 2, 128)
    prompt = KeyStore(shape, 70)
    prompt.blocks_LJC2E.normal_()
    cache.fill([1], prompt, 70)
    cache.slots_SLJC2E[1, :, :, 1:].normal_()
    kept = cache.copy(1, 100)
    keys, values = shape.tokens_of(kept.blocks_LJC2E, 100)
    wanted = shape.tokens_of(prompt.blocks_LJC2E, 70)
    assert torch.equal(keys[:, :, :70], wanted[0])
    assert torch.equal(values[:, :, :70], wanted[1])
    assert torch.equal(kept.blocks_LJC2E[:, :, 2:], cache.slots_SLJC2E[1, :, :, :2])
    assert kept.capacity == -(-100 // BLOCK)
