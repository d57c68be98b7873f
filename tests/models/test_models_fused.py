"""The fused pieces against the plain modules: outputs and gradients, odd sizes, both types, all families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posttrain import models
from posttrain.core import ModelError
from posttrain.models import CausalAttend, Decoder, fused, packed_positions, products, token_stats
from posttrain.models.norm import RmsNorm
from posttrain.models.rope import Rope, rotate

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not fused.available(CPU, torch.float32), reason="no C compiler: plain modules only")
DTYPES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # with the difference allowed, of the largest number


@pytest.fixture
def plain_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function after which the decoder has no fused pieces."""
    return lambda: monkeypatch.setattr(fused, "available", lambda device, dtype: False)


def close(mine: Tensor, exact: Tensor, dtype: torch.dtype) -> bool:
    scale = exact.abs().max().clamp(min=1e-3).item()
    return bool((mine.double() - exact.double()).abs().max().item() <= DTYPES[dtype] * scale)


def exact_attention(
    heads_NAK: Tensor, lengths: list[int], num_heads: int, num_kv_heads: int, window: int | None, rope: Rope | None
) -> Tensor:
    """Rotated, dense-masked attention in fp64."""
    both = num_heads + num_kv_heads
    qk = heads_NAK[None, :, :both]
    if rope is not None:
        rotation = rope.rotation(packed_positions(lengths), torch.float64)
        qk = rotate(qk, rotation)
    group = num_heads // num_kv_heads
    q, k = qk[0, :, :num_heads], qk[0, :, num_heads:].repeat_interleave(group, 1)
    v = heads_NAK[:, both:].repeat_interleave(group, 1)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    age = torch.arange(len(sequence))[:, None] - torch.arange(len(sequence))
    seen = (age >= 0) & (sequence[:, None] == sequence)
    if window is not None:
        seen &= age < window
    scores = torch.einsum("qhk,thk->hqt", q, k) * heads_NAK.shape[-1] ** -0.5
    return torch.einsum("hqt,thk->qhk", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]),
    width=st.sampled_from([2, 8, 16, 20, 32, 64, 80]),
    window=st.sampled_from([None, 1, 5, 32, 50]),
    rotary=st.booleans(),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_attention_and_its_gradient_equal_the_formula(
    configure_rope: Callable[[int], Rope],
    lengths: list[int],
    heads: tuple[int, int],
    width: int,
    window: int | None,
    rotary: bool,
    dtype: torch.dtype,
) -> None:
    check_attention(lengths, heads, width, window, configure_rope(width) if rotary else None, dtype)


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_attention_of_sequences_longer_than_a_chunk(
    configure_rope: Callable[[int], Rope], window: int | None, dtype: torch.dtype
) -> None:
    check_attention([257, 17, 603, 511], (2, 1), 64, window, configure_rope(64), dtype)


def check_attention(
    lengths: list[int],
    heads: tuple[int, int],
    width: int,
    window: int | None,
    rope: Rope | None,
    dtype: torch.dtype,
) -> None:
    H, J = heads
    generator = torch.Generator().manual_seed(sum(lengths))
    heads_NAK = torch.randn(sum(lengths), H + 2 * J, width, generator=generator).to(dtype).requires_grad_()
    pull_NHK = torch.randn(sum(lengths), H, width, generator=generator).to(dtype)
    angles = None
    if rope is not None:
        cos, sin = rope.rotation(packed_positions(lengths), torch.float32)
        angles = (cos[0, :, 0].contiguous(), sin[0, :, 0].contiguous())
    out = fused.attention(heads_NAK, angles, fused.Layout(fused.starts_of(lengths), H, J, window))
    exact_NAK = heads_NAK.detach().double().requires_grad_()
    exact = exact_attention(exact_NAK, lengths, H, J, window, rope)
    assert close(out, exact, dtype)
    (grad,) = torch.autograd.grad(out, heads_NAK, pull_NHK)
    (exact_grad,) = torch.autograd.grad(exact, exact_NAK, pull_NHK.double())
    assert close(grad, exact_grad, dtype)


def test_attention_does_not_depend_on_the_number_of_threads_nor_on_neighbours() -> None:
    torch.manual_seed(0)
    heads_NAK = torch.randn(2000, 8, 32).bfloat16()
    lengths = [900, 100, 1000]
    before = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outs.append(fused.attention(heads_NAK, None, fused.Layout(fused.starts_of(lengths), 4, 2, None)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outs)
    alone = fused.attention(heads_NAK[900:1000], None, fused.Layout(fused.starts_of([100]), 4, 2, None))
    assert torch.equal(alone, outs[0][900:1000])


def test_a_later_token_is_not_seen_even_if_it_is_not_a_number() -> None:
    heads_NAK = torch.randn(40, 3, 16)
    heads_NAK[33:] = torch.nan
    out = fused.attention(heads_NAK, None, fused.Layout(fused.starts_of([40]), 1, 1, None))
    assert torch.isnan(out[33:]).all()
    assert torch.isfinite(out[:32]).all()


def test_sequences_that_are_not_the_row_are_refused() -> None:
    with pytest.raises(ModelError, match="hold 9 tokens, the row 8"):
        fused.attention(torch.zeros(8, 3, 16), None, fused.Layout(fused.starts_of([4, 5]), 1, 1, None))


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 16), (70, 37), (200, 256)])
def test_norm_gives_value_residual_and_both_gradients(rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    module = RmsNorm(width, 1e-6)
    module.weight.data.uniform_(0.5, 1.5)
    x = torch.randn(2, rows, width, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()
    exact_weight = module.weight.detach().double().requires_grad_()
    pulls = torch.randn(2, rows, width), torch.randn(2, rows, width).to(dtype)
    exact = exact_x / (exact_x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * exact_weight
    exact_grads = torch.autograd.grad([exact_x * 1.0, exact], [exact_x, exact_weight], [p.double() for p in pulls])
    residual, normed = fused.norm(x, module.weight, 1e-6, dtype)
    assert torch.equal(residual, x)
    assert normed.dtype == dtype
    assert close(normed, exact, dtype)
    for mine, theirs in zip(
        torch.autograd.grad([residual, normed], [x, module.weight], pulls), exact_grads, strict=True
    ):
        assert close(mine, theirs, torch.float32)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("together", [False, True])
def test_norm_of_heads(dtype: torch.dtype, together: bool) -> None:
    torch.manual_seed(1)
    H, J, K = 4, 2, 20
    widths = (H * K, J * K) if together else (K, K)
    heads = torch.randn(1, 70, H + 2 * J, K).to(dtype).requires_grad_()
    weights = [torch.rand(width, requires_grad=True) for width in widths]
    out = fused.norm_heads(heads, *weights, 1e-5, H, J)
    exact_heads = heads.detach().double().requires_grad_()
    exact_weights = [weight.detach().double().requires_grad_() for weight in weights]
    parts = []
    for piece, weight in zip((exact_heads[:, :, :H], exact_heads[:, :, H : H + J]), exact_weights, strict=True):
        rows = piece.reshape(1, 70, -1, len(weight))
        normed = rows / (rows.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
        parts.append(normed.reshape(piece.shape))
    exact = torch.cat([*parts, exact_heads[:, :, H + J :]], 2)
    assert close(out, exact, dtype)
    assert torch.equal(out[:, :, H + J :], heads[:, :, H + J :])
    pull = torch.randn(out.shape).to(dtype)
    grads = torch.autograd.grad(out, [heads, *weights], pull)
    for mine, theirs in zip(
        grads, torch.autograd.grad(exact, [exact_heads, *exact_weights], pull.double()), strict=True
    ):
        assert close(mine, theirs, dtype)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 16), (33, 37), (100, 704)])
def test_gate_and_sum(rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    inner = (torch.randn(rows, 2 * width) * 4).to(dtype)
    inner[0, 0], inner[-1, -1 - width] = 1e4, -1e4  # exponents that overflow if taken the wrong way
    inner.requires_grad_()
    x = torch.randn(rows, width, requires_grad=True)
    pull = torch.randn(rows, width)
    out = fused.add(x, fused.silu_gate(inner))
    exact_inner, exact_x = inner.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    gate, value = exact_inner.chunk(2, -1)
    exact = exact_x + torch.nn.functional.silu(gate) * value
    assert close(out, exact, dtype)
    exact_grads = torch.autograd.grad(exact, [exact_x, exact_inner], pull.double())
    for mine, theirs in zip(torch.autograd.grad(out, [x, inner], pull), exact_grads, strict=True):
        assert close(mine, theirs, dtype)


def run(model: Decoder, autocast: bool) -> tuple[Tensor, Tensor]:
    """Logprobs of three packed sequences, and the gradient of their sum in one vector."""
    lengths = [7, 33, 1, 20]
    tokens = torch.randint(0, 31, (1, sum(lengths)), generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = model.hidden(tokens, positions_BT=packed_positions(lengths), attend=CausalAttend(lengths))
        stats = token_stats(model, hidden[0], tokens[0].roll(-1))
    model.zero_grad()
    stats.logprobs_N.sum().backward()
    grads = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return stats.logprobs_N.detach(), torch.cat(grads)


def unlike(first: Tensor, second: Tensor) -> float:
    return 1 - torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=0).item()


@pytest.mark.parametrize("recompute", [False, True])
def test_decoder_in_fp32_is_what_it_was(config: Any, plain_only: Callable[[], None], recompute: bool) -> None:
    model = Decoder.random(config, seed=1)
    model.recompute_layers = recompute
    logprobs, grads = run(model, autocast=False)
    plain_only()
    plain_logprobs, plain_grads = run(model, autocast=False)
    assert (logprobs - plain_logprobs).abs().max() <= 1e-5
    assert unlike(grads, plain_grads) < 1e-10


def test_decoder_in_bf16_is_no_further_from_fp32_than_it_was(config: Any, plain_only: Callable[[], None]) -> None:
    model = Decoder.random(config, seed=1)
    fused_logprobs, fused_grads = run(model, autocast=True)
    plain_only()
    exact_logprobs, exact_grads = run(model, autocast=False)
    plain_logprobs, plain_grads = run(model, autocast=True)
    fused_error, plain_error = ((x - exact_logprobs).square().mean() for x in (fused_logprobs, plain_logprobs))
    assert fused_error.sqrt() < 1.25 * plain_error.sqrt()
    assert unlike(fused_grads, exact_grads) < 1.5 * unlike(plain_grads, exact_grads)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_and_frozen_layers_go_the_same_way(configure: Any, plain_only: Callable[[], None], dora: bool) -> None:
    model = Decoder.random(configure("qwen3"), seed=1)
    models.freeze_layers(model, 1)
    learning = run(model, autocast=False)
    models.add_adapters(model, models.LoraConfig(rank=4, dora=dora), seed=1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    adapted = run(model, autocast=False)
    in_bf16 = run(model, autocast=True)
    plain_only()
    plain = run(model, autocast=False)
    assert (adapted[0] - plain[0]).abs().max() <= 1e-5
    assert unlike(adapted[1], plain[1]) < 1e-10
    assert unlike(in_bf16[1], plain[1]) < 1.5 * max(unlike(run(model, autocast=True)[1], plain[1]), 1e-3)
    assert len(learning[1]) < sum(weight.numel() for weight in model.parameters())


def test_scoring_without_a_graph_is_the_same_to_the_bit(configure: Any) -> None:
    model = Decoder.random(configure("qwen2"), seed=1)
    tokens = torch.randint(0, 31, (3, 11), generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        with_graph = model(tokens)
        with torch.no_grad():
            assert torch.equal(model(tokens), with_graph)


def test_without_a_compiler_there_are_no_pieces(monkeypatch: pytest.MonkeyPatch, configure: Any) -> None:
    from posttrain.models import kernels, native

    monkeypatch.setenv("POSTTRAIN_NATIVE", "0")
    for cached in (kernels.library, native.load_native):
        cached.cache_clear()
    try:
        assert not fused.available(CPU, torch.float32)
        logprobs, _ = run(Decoder.random(configure("qwen2"), seed=1), autocast=True)
        assert torch.isfinite(logprobs).all()
    finally:
        monkeypatch.undo()
        for cached in (kernels.library, native.load_native):
            cached.cache_clear()
    assert fused.available(CPU, torch.float32)


@pytest.fixture(scope="session")
def configure_rope() -> Callable[[int], Rope]:
    """A function from a head's width to its rotary positions."""

    def make(width: int) -> Rope:
        shape = {"vocab_size": 9, "width": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "mlp_width": 8}
        return Rope(models.DecoderConfig(**shape, head_dim=width, max_positions=2048))

    return make


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 3, 5), (64, 1, 1), (130, 37, 21)])
def test_fp32_products_and_their_gradients(rows: int, inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(rows)
    module = torch.nn.Linear(inputs, outputs, bias=bias)
    x = torch.randn(2, rows, inputs, requires_grad=True)
    pull = torch.randn(2, rows, outputs)
    out = products.linear(module, x)
    assert torch.allclose(out, module(x), atol=1e-5)
    learning = [x, *module.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad(out, learning, pull), torch.autograd.grad(module(x), learning, pull), strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-4)
    assert torch.allclose(products.times_transposed(x[0], module.weight), x[0] @ module.weight.T, atol=1e-5)


def test_a_linear_layer_with_hooks_is_called() -> None:
    module, seen = torch.nn.Linear(4, 4), []
    module.register_forward_hook(lambda *given: seen.append(1))
    products.linear(module, torch.randn(100, 4))
    assert seen == [1]
