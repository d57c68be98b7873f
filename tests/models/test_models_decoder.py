from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from posttrain.core import ModelError
from posttrain.models import CausalAttend, Decoder, DecoderConfig, packed_positions, token_stats, weight_table
from posttrain.models.attend import causal_attention
from posttrain.models.norm import LayerNorm, RmsNorm


def test_random_weights_depend_on_the_seed_alone(config: DecoderConfig) -> None:
    torch.manual_seed(1)
    first = Decoder.random(config, seed=5).state_dict()
    torch.manual_seed(2)
    again, other = Decoder.random(config, seed=5).state_dict(), Decoder.random(config, seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])


def test_random_weights_have_the_family_s_spread(configure: Callable[..., DecoderConfig]) -> None:
    model = Decoder.random(configure("gpt2", width=128, num_heads=2, num_kv_heads=2, head_dim=64, init_std=0.02))
    state = model.state_dict()
    assert state["layers.0.attention.qkv.weight"].std().item() == pytest.approx(0.02, rel=0.03)
    assert state["layers.0.attention.out.weight"].std().item() == pytest.approx(0.02 / 6**0.5, rel=0.03)  # 2 × 3 layers
    assert state["layers.1.mlp.down.bias"].abs().max() == 0
    assert torch.equal(state["layers.1.mlp_norm.weight"], torch.ones(128))


def test_the_weight_table_is_a_bijection(config: DecoderConfig) -> None:
    table = weight_table(config)
    ours, theirs = [entry.ours for entry in table], [name for entry in table for name in entry.theirs]
    assert sorted(ours) == sorted(Decoder(config).state_dict())
    assert len(set(theirs)) == len(theirs)


@pytest.mark.parametrize("width", [1, 7, 64])
def test_rms_norm_equals_pytorch_s_with_its_gradient(width: int, generator: torch.Generator) -> None:
    norm = RmsNorm(width, 1e-3)
    norm.weight.data.normal_(generator=generator)
    x = torch.randn(3, 5, width, generator=generator, requires_grad=True)
    pull = torch.randn(3, 5, width, generator=generator)
    expected = F.rms_norm(x, (width,), norm.weight, 1e-3)
    expected_grads = torch.autograd.grad(expected, (x, norm.weight), pull)
    out = norm(x)
    assert torch.allclose(out, expected, atol=1e-6)
    for mine, theirs in zip(torch.autograd.grad(out, (x, norm.weight), pull), expected_grads, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(norm(x), out), "sampling and training must norm alike"


def test_rms_norm_by_hand() -> None:
    assert torch.allclose(RmsNorm(2, 0.0)(torch.tensor([3.0, 4.0])), torch.tensor([3.0, 4.0]) / 12.5**0.5)


def test_later_tokens_do_not_reach_back(config: DecoderConfig, generator: torch.Generator) -> None:
    model = Decoder.random(config, seed=1)
    tokens_BT = torch.randint(0, 31, (2, 12), generator=generator)
    changed = tokens_BT.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 31
    before, after = model(tokens_BT), model(changed)
    assert torch.allclose(before[:, :7], after[:, :7], atol=1e-6)
    assert (before[:, 7:] - after[:, 7:]).abs().max() > 0.01


def test_a_window_hides_what_is_older(configure: Callable[..., DecoderConfig], generator: torch.Generator) -> None:
    model = Decoder.random(configure("mistral", num_layers=1, sliding_layers=(0,)), seed=1)  # window of 5
    tokens_BT = torch.randint(0, 31, (1, 12), generator=generator)
    changed = tokens_BT.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 31
    moved = (model(tokens_BT) - model(changed)).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [False] * 3 + [True] * 5 + [False] * 4  # token 3 is seen by tokens 3 … 7


class CacheAttend:
    """What an engine does: keep the keys and values of earlier calls."""

    def __init__(self, num_layers: int) -> None:
        self.keys: list[torch.Tensor | None] = [None] * num_layers
        self.values: list[torch.Tensor | None] = [None] * num_layers

    def __call__(
        self, layer: int, q_BTHK: torch.Tensor, k_BTJK: torch.Tensor, v_BTJK: torch.Tensor, *, window: int | None
    ) -> torch.Tensor:
        k, v = self.keys[layer], self.values[layer]
        k = self.keys[layer] = k_BTJK if k is None else torch.cat((k, k_BTJK), 1)
        v = self.values[layer] = v_BTJK if v is None else torch.cat((v, v_BTJK), 1)
        missing = k.shape[1] - q_BTHK.shape[1]
        return causal_attention(F.pad(q_BTHK, (0, 0, 0, 0, missing, 0)), k, v, window)[:, missing:]


@torch.no_grad()
def test_a_cache_goes_in_through_the_seam(config: DecoderConfig, generator: torch.Generator) -> None:
    model = Decoder.random(config, seed=2)
    tokens_BT = torch.randint(0, 31, (3, 11), generator=generator)
    cache = CacheAttend(config.num_layers)
    parts = [model.hidden(tokens_BT[:, :6], attend=cache)]
    for t in range(6, 11):
        parts.append(model.hidden(tokens_BT[:, t : t + 1], positions_BT=torch.full((3, 1), t), attend=cache))
    assert torch.allclose(model.logits(torch.cat(parts, 1)), model(tokens_BT), atol=1e-5)


def test_learned_positions_have_an_end(configure: Callable[..., DecoderConfig]) -> None:
    model = Decoder.random(configure("gpt2"))
    with pytest.raises(ModelError, match=r"position 64 is beyond the 64"):
        model(torch.zeros(1, 65, dtype=torch.long))
    assert model(torch.zeros(1, 128, dtype=torch.long), lengths=[64, 64]).shape == (1, 128, 31)


def test_recomputed_layers_give_the_same_gradient(config: DecoderConfig, generator: torch.Generator) -> None:
    tokens_BT = torch.randint(0, 31, (1, 14), generator=generator)
    grads = []
    for recompute in (False, True):
        model = Decoder.random(config, seed=2)
        model.recompute_layers = recompute
        model(tokens_BT, lengths=[9, 5]).square().mean().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_bf16_keeps_norms_residual_stream_and_logits_in_fp32(config: DecoderConfig) -> None:
    model = Decoder.random(config, seed=2, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "norm" in name else torch.bfloat16), name
    streams: list[torch.dtype] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _module, _inputs, out: streams.append(out.dtype))
    seen: list[torch.dtype] = []

    def attend(
        layer: int, q_BTHK: torch.Tensor, k_BTJK: torch.Tensor, v_BTJK: torch.Tensor, *, window: int | None
    ) -> torch.Tensor:
        seen.extend(x.dtype for x in (q_BTHK, k_BTJK, v_BTJK))
        return CausalAttend()(layer, q_BTHK, k_BTJK, v_BTJK, window=window)

    hidden = model.hidden(torch.zeros(1, 4, dtype=torch.long), attend=attend)
    assert set(streams) == {torch.float32}
    assert set(seen) == {torch.bfloat16}
    assert model.logits(hidden).dtype == torch.float32


@torch.no_grad()
def test_autocast_over_fp32_weights_is_the_bf16_model(config: DecoderConfig, generator: torch.Generator) -> None:
    sampler = Decoder.random(config, seed=2, dtype=torch.bfloat16)
    trainer = Decoder.random(config, seed=2)
    for mine, theirs in zip(trainer.parameters(), sampler.parameters(), strict=True):
        mine.copy_(theirs)  # fp32 master weights that bf16 can hold
    tokens_BT = torch.randint(0, 31, (2, 13), generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        logits = trainer(tokens_BT)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, sampler(tokens_BT)), "sampler and trainer would disagree on logprobs"


def test_autocast_trains(config: DecoderConfig, generator: torch.Generator) -> None:
    model = Decoder.random(config, seed=2)
    lengths = [9, 17, 4]
    tokens = torch.randint(0, 31, (1, 30), generator=generator)
    grads: list[dict[str, torch.Tensor]] = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            hidden = model.hidden(tokens, positions_BT=packed_positions(lengths), attend=CausalAttend(lengths))
            stats = token_stats(model, hidden[0], tokens[0], entropy=True)
            assert stats.entropy_N is not None
            assert stats.logprobs_N.dtype == stats.entropy_N.dtype == torch.float32
            loss = -stats.logprobs_N.mean() + 0.1 * stats.entropy_N.mean()
        loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() == dict(model.named_parameters()).keys()
    exact, rough = (torch.cat([g.flatten() for g in part.values()]) for part in grads)
    assert rough.dtype == torch.float32
    assert F.cosine_similarity(exact, rough, dim=0) > 0.99


def test_layer_norm_gives_fp32() -> None:
    assert LayerNorm(4, 1e-5)(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.float32
