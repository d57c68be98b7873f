"""Shared prefixes, bf16 attention and projections of the trainer against the formulas and the plain decoder."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from posttrain import models
from posttrain.core import ModelError
from posttrain.models import CausalAttend, Decoder, fused_linear, fused_prefix, packed_positions
from posttrain.models.fused_prefix import share
from posttrain.models.rope import Rope, rotate

CPU = torch.device("cpu")
needs_bf16 = pytest.mark.skipif(
    not (fused_prefix.supported(32) and fused_linear.supported()), reason="no bf16 products on this processor"
)


def config(**changes: object) -> models.DecoderConfig:
    shape: dict[str, object] = {
        "vocab_size": 61,
        "width": 48,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "mlp_width": 70,
        "max_positions": 512,
        "init_std": 0.1,
    }
    return models.DecoderConfig(**{**shape, **changes})  # type: ignore[arg-type]


def distance(mine: Tensor, exact: Tensor) -> float:
    return ((mine.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-9)).item()


def test_a_row_is_laid_out_as_by_hand() -> None:
    row = share([3, 5, 6], [1, 2], [0, 2])
    # sequence 0 is tokens 0-2; the prefix of the others is tokens 3, 4; then 5-7, and 10-13 behind the copy 8, 9
    assert row.kept_M.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13]
    assert row.place_N.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 3, 4, 8, 9, 10, 11]
    assert row.position_M.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 2, 3, 4, 5]
    assert row.starts.tolist() == [0, 3, 5, 8, 12]
    assert row.firsts.tolist() == [0, 1, 4]


def test_without_families_every_sequence_is_computed_by_itself() -> None:
    row = share([4, 2])
    assert row.kept_M.tolist() == row.place_N.tolist() == list(range(6))
    assert row.firsts.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("families", "prefixes"), [([2], [4]), ([3], [1]), ([1, 1], [0])])
def test_a_layout_that_is_none_is_refused(families: list[int], prefixes: list[int]) -> None:
    with pytest.raises(ModelError):
        share([4, 6], families, prefixes)


def exact_attention(heads_NAK: Tensor, lengths: list[int], counts: tuple[int, int], rope: Rope | None) -> Tensor:
    """Every sequence by itself, rotated and masked, in fp64."""
    H, J = counts
    outs = []
    for part in heads_NAK.split(lengths):
        qk = part[None, :, : H + J]
        if rope is not None:
            qk = rotate(qk, rope.rotation(torch.arange(len(part))[None], torch.float64))
        q = qk[0, :, :H]
        k, v = (x.repeat_interleave(H // J, 1) for x in (qk[0, :, H:], part[:, H + J :]))
        scores = torch.einsum("qhk,thk->hqt", q, k) * part.shape[-1] ** -0.5
        hidden = torch.ones(len(part), len(part), dtype=torch.bool).triu(1)
        outs.append(torch.einsum("hqt,thk->qhk", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(outs)


@needs_bf16
@settings(max_examples=40, deadline=None)
@given(
    families=st.lists(st.tuples(st.integers(0, 110), st.lists(st.integers(1, 70), min_size=1, max_size=4)), max_size=3),
    counts=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]),
    width=st.sampled_from([32, 64, 96, 128]),
    rotary=st.booleans(),
)
def test_attention_over_shared_prefixes_equals_the_formula(
    families: list[tuple[int, list[int]]], counts: tuple[int, int], width: int, rotary: bool
) -> None:
    check_attention([*families, (0, [5])], counts, width, rotary)


@needs_bf16
def test_attention_of_segments_longer_than_a_chunk() -> None:
    check_attention([(500, [13, 401, 100]), (0, [777])], (2, 1), 64, True)


def check_attention(families: list[tuple[int, list[int]]], counts: tuple[int, int], width: int, rotary: bool) -> None:
    H, J = counts
    prefixes = [prefix if len(own) > 1 else 0 for prefix, own in families]
    lengths = [prefix + length for prefix, (_, own) in zip(prefixes, families, strict=True) for length in own]
    row = share(lengths, [len(own) for _, own in families], prefixes)
    generator = torch.Generator().manual_seed(sum(lengths))
    heads_MAK = torch.randn(len(row.kept_M), H + 2 * J, width, generator=generator).bfloat16().requires_grad_()
    pull_NHK = torch.randn(sum(lengths), H, width, generator=generator)
    rope = Rope(config(head_dim=width)) if rotary else None
    angles = None
    if rope is not None:
        cos, sin = rope.rotation(row.position_M[None], torch.float32)
        angles = (cos[0, :, 0].contiguous(), sin[0, :, 0].contiguous())
    out_NHK = fused_prefix.attention(heads_MAK, angles, row, H, J).float().index_select(0, row.place_N)
    exact_MAK = heads_MAK.detach().double().requires_grad_()
    exact_NHK = exact_attention(exact_MAK.index_select(0, row.place_N), lengths, counts, rope)
    assert distance(out_NHK, exact_NHK) < 8e-3
    (grad,) = torch.autograd.grad(out_NHK, heads_MAK, pull_NHK)
    (exact_grad,) = torch.autograd.grad(exact_NHK, exact_MAK, pull_NHK.double())
    assert distance(grad, exact_grad) < 1.6e-2


@needs_bf16
def test_attention_does_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    heads = torch.randn(1200, 8, 32).bfloat16().requires_grad_()
    row = share([300, 500, 600], [1, 2], [0, 200])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = fused_prefix.attention(heads, None, row, 4, 2)
            found.append((out, torch.autograd.grad(out, heads, torch.ones_like(out))[0]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@needs_bf16
def test_a_sequence_of_nan_stays_by_itself() -> None:
    heads = torch.randn(60, 4, 32).bfloat16()
    heads[25] = torch.nan
    out = fused_prefix.attention(heads, None, share([20, 40]), 2, 1)
    assert out[:20].isfinite().all()
    assert out[25:].isnan().all()


@needs_bf16
def test_rows_are_gathered_and_their_gradients_added() -> None:
    x = torch.randn(5, 19, requires_grad=True)
    places = torch.tensor([4, 0, 4, 4, 2])
    out = fused_prefix.rows_at(x, places)
    assert torch.equal(out, x[places])
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad[:, 0].tolist() == [1, 0, 1, 0, 3]


@needs_bf16
@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 150),
    inputs=st.sampled_from([2, 10, 34, 64, 98]),
    outputs=st.sampled_from([2, 6, 62, 66, 130]),
    bias=st.booleans(),
)
def test_a_projection_and_its_gradients_equal_the_formula(rows: int, inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(rows)
    module = nn.Linear(inputs, outputs, bias=bias)
    x = torch.randn(rows, inputs).bfloat16().requires_grad_()
    pull = torch.randn(rows, outputs).bfloat16()
    out = fused_linear.linear(module, x)
    grads = torch.autograd.grad(out, [x, *module.parameters()], pull)
    weight = module.weight.detach().bfloat16().double()  # products are of bf16 numbers; sums are not rounded
    exact = x.double() @ weight.T + (module.bias.double() if bias else 0)
    assert out.dtype == torch.bfloat16
    assert distance(out, exact) < 4e-3
    assert distance(grads[0], pull.double() @ weight) < 4e-3
    assert grads[1].dtype == torch.float32
    assert distance(grads[1], pull.double().T @ x.double()) < 1e-5
    assert not bias or distance(grads[2], pull.double().sum(0)) < 1e-5


@needs_bf16
def test_a_frozen_or_odd_projection() -> None:
    frozen = nn.Linear(8, 6).requires_grad_(False)
    x = torch.randn(70, 8).bfloat16().requires_grad_()
    out = fused_linear.linear(frozen, x)
    assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        odd = nn.Linear(8, 5)
        assert torch.equal(fused_linear.linear(odd, x), odd(x))


def states(model: Decoder, tokens: Tensor, lengths: list[int], places: Tensor) -> Tensor:
    """By the plain decoder, in its own precision."""
    attend = CausalAttend(lengths)
    return model.hidden(tokens[None], positions_BT=packed_positions(lengths), attend=attend)[0].index_select(0, places)


def family_of_three() -> tuple[Tensor, list[int]]:
    """Two sequences that begin with the same 40 tokens, and one by itself."""
    generator = torch.Generator().manual_seed(3)
    first, second, other = (torch.randint(0, 61, (num,), generator=generator) for num in (70, 55, 30))
    return torch.cat((first, torch.cat((first[:40], second[40:])), other)), [70, 55, 30]


@needs_bf16
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "lora"])
@pytest.mark.parametrize("shared", [False, True])
def test_packed_states_are_those_of_the_decoder(family: str, shared: bool) -> None:
    """As near to fp32 as PyTorch's own bf16 pass is: states, and every weight's gradient, over a few models."""
    more: dict[str, object] = {"qk_norm": "head"} if family == "qwen3" else {"qkv_bias": True}
    tokens, lengths = family_of_three()
    places = torch.tensor([0, 39, 69, 70, 70 + 39, 100, 124, 125, 154])
    row = share(lengths, [2, 1], [40, 0]) if shared else share(lengths)
    errors: dict[str, list[tuple[float, float]]] = {}  # by name: of ours, of PyTorch's, for each model
    for seed in range(4):
        model = Decoder.random(config(**more), seed=seed)
        if family == "lora":
            models.add_adapters(model, models.LoraConfig(rank=4), seed=seed)
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
        assert models.shares_prefixes(model, CPU, torch.bfloat16)
        # A sum of squares would hardly depend on the weights: the last norm makes it nearly constant.
        direction = torch.randn(len(places), model.config.width, generator=torch.Generator().manual_seed(seed))
        found = {}
        for kind in ("exact", "autocast", "own"):
            mine = copy.deepcopy(model)
            with torch.autocast("cpu", torch.bfloat16, enabled=kind != "exact"):
                if kind == "own":
                    out = models.packed_states(mine, tokens, row, places)
                else:
                    out = states(mine, tokens, lengths, places)
            (out * direction).sum().backward()
            found[kind] = {"states": out.detach(), **{name: weight.grad for name, weight in mine.named_parameters()}}
        for name, exact in found["exact"].items():
            assert (exact is None) == (found["own"][name] is None)
            if exact is not None:
                pair = (distance(found["own"][name], exact), distance(found["autocast"][name], exact))
                errors.setdefault(name, []).append(pair)
    for name, pairs in errors.items():
        ours, theirs = (math.hypot(*values) for values in zip(*pairs, strict=True))
        assert ours < 1.5 * theirs + 1e-3, name


@needs_bf16
def test_layers_that_are_computed_again_give_the_same_bits() -> None:
    tokens, lengths = family_of_three()
    row, places, found = share(lengths, [2, 1], [40, 0]), torch.arange(5, 150), []
    for recompute in (False, True):
        model = Decoder.random(config())
        model.recompute_layers = recompute
        models.packed_states(model, tokens, row, places).square().sum().backward()
        found.append([weight.grad for weight in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True) if one is not None)


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 24},
        {"positions": "learned"},
        {"activation": "gelu"},
        {"norm_placement": "post"},
        {"sliding_window": 16, "sliding_layers": (0,)},
    ],
)
def test_what_it_does_not_do_is_left_to_the_decoder(changes: dict[str, object]) -> None:
    assert not models.shares_prefixes(Decoder.random(config(**changes)), CPU, torch.bfloat16)


def test_hooked_and_fp32_models_are_left_to_the_decoder() -> None:
    model = Decoder.random(config())
    assert not models.shares_prefixes(model, CPU, torch.float32)
    model.layers[0].register_forward_hook(lambda module, inputs, output: None)
    assert not models.shares_prefixes(model, CPU, torch.bfloat16)
