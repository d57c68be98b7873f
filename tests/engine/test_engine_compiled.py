"""The compiled forward pass against the decoder: families, sizes, threads, prompts, changing weights, adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from posttrain.core import Sampling
from posttrain.engine import LocalEngine
from posttrain.engine.attention import SingleTokens
from posttrain.engine.blocks import BLOCK, BlockCache, BlockShape, KeyStore, places_of
from posttrain.engine.cache import SlotCache
from posttrain.engine.compiled import CompiledDecoder, fits
from posttrain.models import Decoder, DecoderConfig, LoraConfig, add_adapters

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 203,
    "width": 64,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "mlp_width": 90,
    "max_positions": 512,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_embeddings": True},
    "qwen2": {"qkv_bias": True, "num_kv_heads": 1},
    "qwen3": {"qk_norm": "head", "head_dim": 64},
    "wide heads": {"head_dim": 128, "num_heads": 2},
    "odd heads": {"head_dim": 24, "num_heads": 3, "num_kv_heads": 3},
    "every bias": {"qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "window": {"sliding_window": 9, "sliding_layers": (0, 2)},
}


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def make(seed: int = 0, **changes: Any) -> Decoder:
    """Random weights that are exact in bf16, norms and biases far from their start."""
    model = Decoder.random(DecoderConfig(**{**SHAPE, **changes}), seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.2 * torch.randn(weight.shape, generator=draw))
            else:
                weight.mul_(4.0)
            weight.copy_(weight.bfloat16())
    return model.requires_grad_(False)


def halved(model: Decoder) -> Decoder:
    copy = Decoder.random(model.config, 0)
    copy.load_state_dict(model.state_dict())
    return copy.cast(torch.bfloat16).requires_grad_(False)


def make_cache(config: DecoderConfig, slots: int, dtype: torch.dtype, seed: int = 1) -> SlotCache:
    cache = SlotCache(
        num_layers=config.num_layers,
        num_slots=slots,
        num_kv_heads=config.num_kv_heads,
        max_length=160,
        head_dim=config.head_dim,
        dtype=dtype,
        device=CPU,
    )
    draw = torch.Generator().manual_seed(seed)
    for store in (cache.keys, cache.values):
        for layer in store:
            layer.copy_(torch.randn(layer.shape, generator=draw).bfloat16())
    return cache


def make_blocks(config: DecoderConfig, slots: int, seed: int = 1) -> BlockCache:
    """The same keys and values as `make_cache` makes."""
    plain, shape = make_cache(config, slots, torch.bfloat16, seed), BlockShape.of(config)
    blocks = BlockCache(shape, slots, 160)
    lanes = shape.elements // BLOCK
    for layer in range(config.num_layers):
        keys_SJCTK = plain.keys[layer].unflatten(2, (-1, BLOCK))
        keys = keys_SJCTK.unflatten(4, (-1, 2)).transpose(3, 4).flatten(3)
        blocks.slots_SLJC2E[:, layer, :, :, 0, : keys.shape[-1]] = keys
        values = torch.nn.functional.pad(plain.values[layer], (0, lanes - config.head_dim))
        parts = values.unflatten(2, (-1, BLOCK // 2, 2)).unflatten(5, (-1, 32))  # S J C T/2 2 P 32
        blocks.slots_SLJC2E[:, layer, :, :, 1] = parts.permute(0, 1, 2, 5, 3, 6, 4).flatten(3)
    return blocks


def step(compiled: CompiledDecoder, cache: BlockCache, tokens: Any, slots: Any, lengths: Any) -> Tensor:
    columns = (np.array(column, dtype=np.int64) for column in (tokens, slots, lengths))
    return compiled.forward(cache.places, *columns)


def plain(model: Decoder, cache: SlotCache, tokens: Tensor, lengths: Tensor) -> Tensor:
    attend = SingleTokens(cache, lengths, int(lengths.max()), ragged=True)
    with torch.inference_mode():
        return model.logits(model.hidden(tokens[:, None], positions_BT=lengths[:, None], attend=attend)[:, 0])


def need(model: Decoder) -> CompiledDecoder:
    if not fits(model.config, torch.bfloat16, CPU):
        pytest.skip("no compiler or no AVX-512 bf16 on this machine")
    return CompiledDecoder(halved(model), 160)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 3, 29])
def test_a_step_is_the_decoders(family: str, rows: int) -> None:
    model = make(**FAMILIES[family])
    compiled = need(model)
    draw = torch.Generator().manual_seed(rows)
    tokens = torch.randint(0, 203, (rows,), generator=draw)
    lengths = torch.randint(0, 150, (rows,), generator=draw)
    exact_cache, half_cache = (make_cache(model.config, rows + 1, dtype) for dtype in (torch.float32, torch.bfloat16))
    own = make_blocks(model.config, rows + 1)
    exact = plain(model, exact_cache, tokens, lengths)
    half = plain(halved(model), half_cache, tokens, lengths)
    ours = step(compiled, own, tokens, np.arange(rows), lengths)
    assert ours.shape == exact.shape
    slack = 1.1 if rows > 10 else 1.6  # the mean over few rows is a matter of luck
    assert (ours - exact).abs().mean() <= slack * (half - exact).abs().mean(), "no worse than PyTorch's bf16"
    assert (ours - exact).abs().max() < 0.1 * exact.std()
    for slot in range(rows + 1):
        keys, values = own.shape.tokens_of(own.slots_SLJC2E[slot], 160)
        for layer in range(model.config.num_layers):
            torch.testing.assert_close(keys[layer].float(), exact_cache.keys[layer][slot], atol=0.1, rtol=0.05)
            torch.testing.assert_close(values[layer].float(), exact_cache.values[layer][slot], atol=0.1, rtol=0.05)


@pytest.mark.parametrize("family", ["llama", "window", "qwen3"])
def test_a_prompt_read_at_once_is_the_prompt_read_token_by_token(family: str) -> None:
    model = make(**FAMILIES[family])
    compiled = need(model)
    prompts = [list(range(1, 151)), [7], [9, 8, 7, 6, 5], list(range(60, 90)), [3, 3], *([[5, 6, 7]] * 9)]
    whole = [KeyStore(BlockShape.of(model.config), 150) for _ in prompts]
    lengths = np.array([len(prompt) for prompt in prompts])
    ends = np.cumsum(lengths)
    outputs = np.full(ends[-1], -1)
    outputs[ends - 1] = np.arange(len(prompts))
    at_once = compiled.forward(
        places_of(whole),
        np.concatenate(prompts),
        np.repeat(np.arange(len(prompts)), lengths),
        np.concatenate([np.arange(length) for length in lengths]),
        sequences=np.concatenate(([0], ends)),
        outputs_N=outputs,
    )
    single = BlockCache(BlockShape.of(model.config), len(prompts), 160)
    for row, prompt in enumerate(prompts):
        for place, token in enumerate(prompt):
            last = step(compiled, single, [token], [row], [place])
        assert torch.equal(at_once[row], last[0]), "to the bit, however the rows were shared among threads"


def test_neighbours_and_threads_change_no_bit() -> None:
    model = make()
    compiled = need(model)
    tokens, lengths = np.arange(40) + 5, np.arange(40) * 3
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        cache = make_blocks(model.config, 40)
        together = step(compiled, cache, tokens, np.arange(40), lengths)
        alone = [step(compiled, cache, tokens[[r]], [r], lengths[[r]])[0] for r in range(40)]
        assert torch.equal(together, torch.stack(alone))
        results.append(together.clone())
    assert torch.equal(*results)


def test_nan_stays_in_its_row() -> None:
    model = make()
    compiled = need(model)
    cache = make_blocks(model.config, 6)
    cache.slots_SLJC2E[2, :, :, :, 0] = float("nan")
    logits = step(compiled, cache, np.arange(6), np.arange(6), np.full(6, 20))
    assert logits[2].isnan().all()
    assert logits[[0, 1, 3, 4, 5]].isfinite().all()


def test_changed_weights_are_packed_again() -> None:
    model, other = make(0), make(1)
    compiled = need(model)
    shared = halved(model)
    cache = make_blocks(model.config, 2)

    def logits() -> Tensor:
        compiled.refresh(shared)
        return step(compiled, cache, [1, 2], [0, 1], [5, 9]).clone()

    before = logits()
    assert torch.equal(before, logits())
    shared.load_state_dict(other.state_dict())
    changed = logits()
    assert not torch.allclose(before, changed)
    assert torch.equal(changed, CompiledLike(other).logits(cache))


class CompiledLike:
    """A fresh compiled pass of a model."""

    def __init__(self, model: Decoder) -> None:
        self.compiled = CompiledDecoder(halved(model), 160)

    def logits(self, cache: BlockCache) -> Tensor:
        return step(self.compiled, cache, [1, 2], [0, 1], [5, 9]).clone()


def test_adapters_reach_the_compiled_pass() -> None:
    model = make()
    need(model)
    tuned = halved(model)
    add_adapters(tuned, LoraConfig(rank=4), seed=1)
    cache = make_blocks(model.config, 2)
    start = CompiledDecoder(tuned, 160)
    one = step(start, cache, [1, 2], [0, 1], [5, 9]).clone()
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora" in name.lower() or weight.requires_grad:
                weight.add_(0.3)
    start.refresh(tuned)
    two = step(start, cache, [1, 2], [0, 1], [5, 9])
    assert (one - two).abs().max() > 1e-2


@pytest.mark.parametrize("change", [{"norm": "layer"}, {"norm_placement": "post"}, {"positions": "learned"}])
def test_other_families_are_left_to_the_decoder(change: dict[str, Any]) -> None:
    assert not fits(DecoderConfig(**{**SHAPE, **change}), torch.bfloat16, CPU)


def test_other_types_and_devices_are_left_to_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DecoderConfig(**SHAPE)
    assert not fits(config, torch.float32, CPU)
    assert not fits(config, torch.bfloat16, torch.device("meta"))
    assert not fits(DecoderConfig(**{**SHAPE, "width": 48}), torch.bfloat16, CPU)


class Ids:
    """A tokenizer of ids that mean nothing."""

    eos_ids = frozenset({0})
    vocab_size = 203

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        raise NotImplementedError

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return ""


def test_the_engine_samples_the_same_answers_with_prompts_short_long_and_continued() -> None:
    model = make()
    need(model)
    prompts = [list(range(3, 3 + length)) for length in (1, 2, 17, 40, 90, 5)]
    answers = []
    for prefill in (4096, 16):
        with LocalEngine(
            model, Ids(), max_batch=8, max_length=128, dtype=torch.bfloat16, prefill_tokens=prefill,
            prefix_tokens=400,
        ) as engine:  # fmt: skip
            sampling = Sampling(max_tokens=20, temperature=1.0, seed=3, n=2, ignore_eos=True)
            first = engine.generate(prompts, sampling)
            longer = [[*prompt, *first[2 * i].tokens] for i, prompt in enumerate(prompts)]
            second = engine.generate(longer[:4], Sampling(max_tokens=5, temperature=0.0, ignore_eos=True))
            answers.append([completion.tokens for completion in (*first, *second)])
    assert answers[0] == answers[1], "chunks and kept prefixes change no bit of the compiled pass"
