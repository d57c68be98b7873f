"""Adapters: what they compute, what learns, what is saved, and what is refused."""

from __future__ import annotations

import copy
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from posttrain import models
from posttrain.core import ConfigError, MissingExtraError, ModelError
from posttrain.models import Decoder, DecoderConfig, LoraConfig, adapters_off
from posttrain.models.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from posttrain.models.dora import gains, row_norms
from posttrain.models.lora import LoraLinear, Part, lora_layers

TOKENS = torch.randint(0, 31, (2, 13), generator=torch.Generator().manual_seed(1))


def stirred(model: Decoder, seed: int = 9) -> Decoder:
    """Adapters that have moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def learning(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# Worked by hand


def make_layer(**changes: Any) -> LoraLinear:
    """W = [[1, 2], [3, 4], [5, 6]]; the last two rows are adapted: A = [1, −1], B = [[2], [1]], s = 6 / 1."""
    base = nn.Linear(2, 3, bias=True)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
        base.bias.copy_(torch.tensor([0.5, 0.0, 0.0]))
    config = LoraConfig(**{"rank": 1, "alpha": 6.0, **changes})
    layer = LoraLinear(base, [Part("x.k_proj", 1, 2)], config, seed=0)
    with torch.no_grad():
        layer.lora_A.copy_(torch.tensor([[1.0, -1.0]]))
        layer.lora_B["k_proj"].copy_(torch.tensor([[2.0], [1.0]]))
    return layer


def test_a_part_of_a_fused_matrix_by_hand() -> None:
    layer = make_layer()
    # s B A = 6 · [[2, −2], [1, −1]]
    torch.testing.assert_close(layer.delta(), torch.tensor([[0.0, 0.0], [12.0, -12.0], [6.0, -6.0]]))
    torch.testing.assert_close(layer.merged_weight(), torch.tensor([[1.0, 2.0], [15.0, -8.0], [11.0, 0.0]]))
    x = torch.tensor([[1.0, 2.0]])
    # 1 + 4 + 0.5; 15 − 16; 11
    torch.testing.assert_close(layer(x), torch.tensor([[5.5, -1.0, 11.0]]))
    with adapters_off(layer):
        torch.testing.assert_close(layer(x), torch.tensor([[5.5, 11.0, 17.0]]))


def test_rslora_divides_by_the_root() -> None:
    assert LoraConfig(rank=16, alpha=32.0).scale == 2.0
    assert LoraConfig(rank=16, alpha=32.0, rslora=True).scale == 8.0


def test_dora_by_hand() -> None:
    torch.testing.assert_close(row_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]])), torch.tensor([5.0, 2.0]))
    # rows 1 and 2 of four: m / norm = 6 / 3, 2 / 4
    found = gains(torch.tensor([9.0, 3.0, 4.0, 9.0]), [(slice(1, 3), torch.tensor([6.0, 2.0]))])
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0, 0.5, 1.0]))
    layer = make_layer(dora=True)
    norms = torch.tensor([5.0, 61.0**0.5])  # of the base's rows (3, 4) and (5, 6)
    torch.testing.assert_close(layer.magnitude["k_proj"].data, norms)
    adapted = torch.tensor([[15.0, -8.0], [11.0, 0.0]])  # of norms 17 and 11
    expected = adapted * (norms / torch.tensor([17.0, 11.0]))[:, None]
    torch.testing.assert_close(layer.merged_weight()[1:], expected)
    torch.testing.assert_close(layer.merged_weight()[0], torch.tensor([1.0, 2.0]))
    x = torch.tensor([[1.0, 2.0]])
    torch.testing.assert_close(layer(x)[0, 1:], expected @ x[0])


def test_the_start_is_kaimings_and_zero() -> None:
    config = LoraConfig(rank=64)
    layer = LoraLinear(nn.Linear(400, 8), [Part("x.q_proj", 0, 4), Part("x.k_proj", 4, 4)], config, seed=0)
    assert layer.lora_A.shape == (128, 400)
    assert float(layer.lora_A.detach().abs().max()) == pytest.approx(400**-0.5, rel=1e-2)
    assert float(layer.lora_A.detach().std()) == pytest.approx((400 * 3) ** -0.5, rel=1e-2)
    assert all(not b.any() for b in layer.lora_B.values())
    other = LoraLinear(nn.Linear(400, 8), [Part("x.k_proj", 4, 4)], config, seed=0)
    assert torch.equal(other.lora_A, layer.lora_A[64:]), "a part's start does not depend on the other parts"


# On a decoder


def test_fresh_adapters_change_nothing_and_only_they_learn(config: DecoderConfig) -> None:
    model = Decoder.random(config, 1)
    before = model(TOKENS)
    bare = learning(model)
    assert models.add_adapters(model, LoraConfig(rank=3)) is model
    assert torch.equal(model(TOKENS), before)
    names = learning(model)
    assert names
    assert all(".lora_A" in name or ".lora_B." in name for name in names)
    assert bare <= {name for name, _ in model.named_parameters()}, "the base's weights keep their names"
    per_layer = 4 if config.family == "gpt2" else 7
    assert sum(len(layer.parts) for layer in lora_layers(model).values()) == per_layer * config.num_layers
    assert models.adapter_config(model) == LoraConfig(rank=3)
    with pytest.raises(ModelError, match="has adapters already"):
        models.add_adapters(model, LoraConfig())


def test_adapters_off_is_the_base_in_this_thread_alone(llama: Decoder) -> None:
    plain = llama(TOKENS)
    stirred(models.add_adapters(llama, LoraConfig(rank=3)))
    adapted = llama(TOKENS)
    elsewhere: list[torch.Tensor] = []
    with adapters_off(llama):
        assert torch.equal(llama(TOKENS), plain)
        thread = threading.Thread(target=lambda: elsewhere.append(llama(TOKENS)))
        thread.start()
        thread.join()
        assert torch.equal(copy.deepcopy(llama)(TOKENS), adapted), "a copy is another model"
    assert torch.equal(elsewhere[0], adapted), "a sampler that shares the model goes on with its adapters"
    assert torch.equal(llama(TOKENS), adapted)


@pytest.mark.parametrize("changes", [{}, {"dora": True}], ids=["lora", "dora"])
def test_merging(config: DecoderConfig, changes: dict[str, Any], tmp_path: Path) -> None:
    model = stirred(models.add_adapters(Decoder.random(config, 1), LoraConfig(rank=3, alpha=6.0, **changes)))
    adapted = model(TOKENS)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    with models.merged_adapters(model):
        assert all(not layer.active for layer in lora_layers(model).values())
        torch.testing.assert_close(model(TOKENS), adapted, atol=2e-5, rtol=1e-4)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert torch.equal(model(TOKENS), adapted)
    models.save(model, tmp_path / "saved")
    merged = models.merge_adapters(model)
    assert not models.has_adapters(merged)
    torch.testing.assert_close(merged(TOKENS), adapted, atol=2e-5, rtol=1e-4)
    plain = Decoder.random(config, 1)
    assert learning(merged) == learning(plain)
    loaded = models.load(tmp_path / "saved").state_dict()
    assert loaded.keys() == merged.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(weight, loaded[name]) for name, weight in merged.state_dict().items())


def test_only_the_named_targets(llama: Decoder) -> None:
    models.add_adapters(llama, LoraConfig(rank=2, targets=("q_proj", "v_proj", "up_proj")))
    assert [part.short for part in llama.get_submodule("layers.0.attention.qkv").parts] == ["q_proj", "v_proj"]  # type: ignore[union-attr]
    stirred(llama)
    delta = llama.get_submodule("layers.0.attention.qkv").delta()  # type: ignore[operator]
    assert delta[:16].any()
    assert not delta[16:24].any(), "k has no adapter"
    assert delta[24:].any()
    assert type(llama.get_submodule("layers.0.mlp.down")) is nn.Linear


def test_an_unknown_target_names_the_known(llama: Decoder) -> None:
    with pytest.raises(ConfigError, match="no target c_attn in a llama; there are down_proj, gate_proj, k_proj"):
        models.add_adapters(llama, LoraConfig(targets=("c_attn", "q_proj")))
    assert not models.has_adapters(llama)
    assert learning(llama), "nothing was frozen"


def test_dropout_is_for_training_alone(llama: Decoder) -> None:
    stirred(models.add_adapters(llama, LoraConfig(rank=4, dropout=0.5)))
    assert torch.equal(llama.eval()(TOKENS), llama(TOKENS))
    torch.manual_seed(0)
    assert not torch.equal(llama.train()(TOKENS), llama(TOKENS))


def test_a_rank_of_the_full_width_can_be_any_matrix() -> None:
    """Gradient descent through A and B finds a target matrix exactly, where the rank allows it."""
    torch.manual_seed(0)
    target = torch.randn(6, 8)
    layer = LoraLinear(nn.Linear(8, 6, bias=False), [Part("x.q_proj", 0, 6)], LoraConfig(rank=6, alpha=6.0), seed=1)
    optimiser = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.02)
    for _ in range(1500):
        loss = (layer.base_weight() + layer.delta() - target).square().mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert float(loss.detach()) < 1e-6
    torch.testing.assert_close(layer(torch.eye(8)), target.T, atol=5e-3, rtol=0)


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_against_finite_differences(dora: bool) -> None:
    """DoRA takes its norm for a constant, so only the magnitudes' gradient is that of the function."""
    layer = make_layer(dora=dora).double()
    x = torch.tensor([[0.3, -0.7], [1.1, 0.4]], dtype=torch.float64)
    learns = [layer.magnitude["k_proj"]] if dora else [layer.lora_A, layer.lora_B["k_proj"]]
    out = layer(x).square().sum()
    grads = torch.autograd.grad(out, learns)
    for parameter, grad in zip(learns, grads, strict=True):
        flat = parameter.data.view(-1)
        for place in range(flat.numel()):
            values = []
            for step in (1e-2, -1e-2):
                flat[place] += step
                values.append(float(layer(x).detach().square().sum()))
                flat[place] -= step
            assert (values[0] - values[1]) / 2e-2 == pytest.approx(float(grad.view(-1)[place]), rel=1e-3, abs=1e-3)


def test_a_bf16_copy_has_the_adapters(llama: Decoder) -> None:
    stirred(models.add_adapters(llama, LoraConfig(rank=4)))
    small = copy.deepcopy(llama).cast(torch.bfloat16)
    exact, rounded = llama(TOKENS), small(TOKENS)
    with adapters_off(llama):
        base = llama(TOKENS)
    assert (rounded - exact).abs().mean() < 0.1 * (base - exact).abs().mean()


# On disk


def test_adapters_come_back_bit_for_bit(config: DecoderConfig, tmp_path: Path) -> None:
    for number, changes in enumerate([{"rslora": True}, {"dora": True}]):
        model = stirred(models.add_adapters(Decoder.random(config, 1), LoraConfig(rank=3, alpha=5.0, **changes)))
        folder = models.save_adapters(model, tmp_path / str(number), base="base")
        again = models.load_adapters(Decoder.random(config, 1), folder)
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())
        assert torch.equal(again(TOKENS), model(TOKENS))
        assert learning(again) == learning(model)
        assert models.is_adapter_folder(folder)
        models.save_adapters(again, folder, base="base")  # over what is there
    size = sum(tensor.numel() for tensor in load_file(folder / ADAPTER_WEIGHTS).values())
    assert size < sum(weight.numel() for weight in model.parameters()) / 2, "only what was learned is written"


def test_the_base_may_lie_beside_the_adapters(llama: Decoder, tmp_path: Path) -> None:
    models.add_adapters(llama, LoraConfig(rank=2))
    (tmp_path / "base").mkdir()
    folder = models.save_adapters(llama, tmp_path / "adapter", base="../base")
    assert Path(models.base_of(folder)).samefile(tmp_path / "base")
    assert models.base_of(models.save_adapters(llama, tmp_path / "hub", base="owner/name")) == "owner/name"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern="),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"r": None}, "Expected `int`"),
        ({"r": 5}, r"has shape \[2, 16\], this model asks for \[5, 16\]"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    llama: Decoder, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = models.save_adapters(models.add_adapters(llama, LoraConfig(rank=2)), tmp_path / "a", base="base")
    values = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps({**values, **change}))
    fresh = Decoder.random(llama.config, 3)
    with pytest.raises(ModelError, match=message):
        models.load_adapters(fresh, folder)
    assert not models.has_adapters(fresh)


def test_damaged_folders_are_refused(llama: Decoder, tmp_path: Path, configure: Callable[..., DecoderConfig]) -> None:
    folder = models.save_adapters(models.add_adapters(llama, LoraConfig(rank=2)), tmp_path / "a", base="base")
    fresh = Decoder.random(llama.config, 3)
    with pytest.raises(ModelError, match=r"do not fit this gpt2: .*unexpected model\.layers\.0"):
        models.load_adapters(Decoder.random(configure("gpt2")), folder)
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    with pytest.raises(ModelError, match=r"missing model\.layers\.1\.mlp\.up_proj\.lora_B"):
        models.load_adapters(fresh, folder)
    (folder / ADAPTER_WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="not readable as safetensors"):
        models.load_adapters(fresh, folder)
    (folder / ADAPTER_WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickle files are never read"):
        models.load_adapters(fresh, folder)
    with pytest.raises(ModelError, match="no adapters to save"):
        models.save_adapters(fresh, tmp_path / "b", base="base")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("")
    with pytest.raises(ModelError, match="is no adapter folder"):
        models.save_adapters(llama, tmp_path / "notes", base="base")


# Frozen prefixes, and 4 bits


def test_frozen_layers_get_no_gradient(config: DecoderConfig) -> None:
    model = models.freeze_layers(Decoder.random(config, 1), 2)
    model(TOKENS).square().mean().backward()
    moved = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert moved == learning(model)
    assert {name.split(".")[1] for name in moved if name.startswith("layers.")} == {"2"}
    assert "embed.weight" not in moved
    assert "final_norm.weight" in moved
    with pytest.raises(ModelError, match="cannot freeze 4 layers of a model that has 3"):
        models.freeze_layers(model, 4)


def test_four_bits_need_their_library(llama: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"bitsandbytes.*posttrain\[quantised\]"):
        models.quantise(llama)
    assert type(llama.get_submodule("layers.0.mlp.down")) is nn.Linear


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_adapters_on_a_base_in_four_bits(family: str, configure: Callable[..., DecoderConfig], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `quantised` is not installed")
    config = configure(family, width=64, head_dim=16, mlp_width=128)
    plain = Decoder.random(config, 1)
    exact = plain(TOKENS)
    packed = models.quantise(copy.deepcopy(plain))
    rough = packed(TOKENS)
    assert not learning(packed)
    assert 0 < float((rough - exact).detach().abs().mean()) < 0.5 * float(exact.detach().abs().mean())
    assert sum(weight.numel() for weight in packed.parameters()) < 0.3 * sum(w.numel() for w in plain.parameters())
    models.add_adapters(packed, LoraConfig(rank=4))
    assert torch.equal(packed(TOKENS), rough)
    stirred(packed)
    adapted = packed(TOKENS)
    adapted.square().mean().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in packed.parameters() if weight.requires_grad)
    assert torch.equal(copy.deepcopy(packed)(TOKENS), adapted)
    with adapters_off(packed):
        assert torch.equal(packed(TOKENS), rough)
    models.save(packed, tmp_path / "merged")
    torch.testing.assert_close(models.load(tmp_path / "merged")(TOKENS), adapted.detach(), atol=1e-4, rtol=1e-3)
    with pytest.raises(ModelError, match="4 bits cannot take its adapters in"), models.merged_adapters(packed):
        pass
    merged = models.merge_adapters(packed)
    torch.testing.assert_close(merged(TOKENS), adapted, atol=1e-4, rtol=1e-3)
    assert learning(merged) == learning(plain)
