"""Adapters against PEFT, on random-initialised models of every family: the same files, logits and gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain import models
from posttrain.models import Decoder, LoraConfig

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

FIGURES: list[tuple[float, float]] = []  # |Δloss| and cosine of the gradients, for the table of parity
VOCAB = 61
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.15}
CASES: dict[str, dict[str, Any]] = {
    "gpt2": {**GPT2, "bos_token_id": 1, "eos_token_id": 2},
    "llama": {**BASE, "attention_bias": True},
    "mistral": {**BASE, "sliding_window": 7},
    "olmo2": BASE,
    "qwen2": {**BASE, "tie_word_embeddings": True},
    "qwen3": {**BASE, "head_dim": 12},
}
every_family = pytest.mark.parametrize("family", sorted(CASES))
KINDS = {
    "plain": {},
    "rslora": {"rslora": True, "alpha": 7.0},
    "dora": {"dora": True},
    "some": {"targets": ("q_proj", "v_proj", "down_proj")},
}


def base_folder(family: str, folder: Path) -> Path:
    torch.manual_seed(sorted(CASES).index(family))
    config = transformers.AutoConfig.for_model(family, **CASES[family])
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def lora_config(kind: str, family: str) -> LoraConfig:
    changes: dict[str, Any] = dict(KINDS[kind])
    if family == "gpt2" and "targets" in changes:
        changes["targets"] = ("c_attn", "c_proj")
    return LoraConfig(**{"rank": 4, "alpha": 8.0, **changes})


def stirred(model: Any, seed: int = 9) -> Any:
    """Adapters that have moved: B is no longer 0, DoRA's magnitudes no longer the norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (3, 29), generator=torch.Generator().manual_seed(5))


def theirs_on(base: Path, adapter: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def peft_model(base: Path, family: str, **options: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    settings = {"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", "target_modules": "all-linear", **options}
    return peft.get_peft_model(model, peft.LoraConfig(fan_in_fan_out=family == "gpt2", **settings))


@pytest.mark.parametrize("kind", KINDS)
@every_family
@torch.no_grad()
def test_peft_loads_what_we_save(family: str, kind: str, tmp_path: Path) -> None:
    base = base_folder(family, tmp_path / "base")
    ours = models.load(base)
    plain = ours(tokens())
    models.add_adapters(ours, lora_config(kind, family), seed=1)
    assert torch.allclose(ours(tokens()), plain, atol=1e-5), "fresh adapters change nothing"
    stirred(ours)
    models.save_adapters(ours, tmp_path / "adapter", base=base)
    with_adapters = ours(tokens())
    assert (with_adapters - plain).abs().max() > 0.1, "adapters that do nothing would agree with anything"
    theirs = theirs_on(base, tmp_path / "adapter")
    assert (theirs(tokens()).logits - with_adapters).abs().max() <= 1e-5
    with theirs.disable_adapter(), models.adapters_off(ours):
        assert (theirs(tokens()).logits - ours(tokens())).abs().max() <= 1e-5


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["plain", "rslora", "dora"])
@every_family
@torch.no_grad()
def test_we_load_what_peft_saves(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    base = base_folder(family, tmp_path / "base")
    theirs = stirred(peft_model(base, family, **options)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = models.load_adapters(models.load(base), tmp_path / "adapter")
    expected = theirs(tokens()).logits
    assert (ours(tokens()) - expected).abs().max() <= 1e-5
    assert models.base_of(tmp_path / "adapter") == str(base)
    names = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert names
    assert all("lora_" in name or "magnitude" in name for name in names)


@pytest.mark.parametrize("kind", ["plain", "dora"])
@every_family
@torch.no_grad()
def test_the_merged_export_is_a_plain_folder(family: str, kind: str, tmp_path: Path) -> None:
    base = base_folder(family, tmp_path / "base")
    ours = stirred(models.add_adapters(models.load(base), lora_config(kind, family)))
    expected = ours(tokens())
    models.save(ours, tmp_path / "merged")
    names = set(json.loads((tmp_path / "merged" / "config.json").read_text()))
    assert "model_type" in names
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (theirs.eval()(tokens()).logits - expected).abs().max() <= 1e-5
    assert models.has_adapters(ours), "saving leaves the model as it was"
    assert torch.equal(ours(tokens()), expected)


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_gradients_are_those_of_peft(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    base = base_folder(family, tmp_path / "base")
    theirs = stirred(peft_model(base, family, **options))
    theirs.save_pretrained(tmp_path / "adapter")
    ours = models.load_adapters(models.load(base), tmp_path / "adapter")
    batch = tokens()
    loss_of = torch.nn.functional.cross_entropy
    their_loss = loss_of(theirs.eval()(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    loss = loss_of(ours(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    their_loss.backward()
    loss.backward()
    expected = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }
    found = gradients_by_peft_name(ours)
    assert {name.removesuffix(".weight") for name in found} == {name.removesuffix(".weight") for name in expected}
    for name, grad in expected.items():
        mine = found.get(name, found.get(name.removesuffix(".weight")))
        assert mine is not None, name
        FIGURES.append((abs(loss.item() - their_loss.item()), cosine(mine, grad)))
        assert cosine(mine, grad) >= 0.9999, name
        assert float(mine.norm() / grad.norm()) == pytest.approx(1.0, abs=1e-3), name


def gradients_by_peft_name(model: Decoder) -> dict[str, torch.Tensor]:
    """What `to_peft_tensors` gives, of the gradients."""
    grads: dict[str, torch.Tensor] = {}
    for layer in model.modules():
        if isinstance(layer, models.lora.LoraLinear):
            assert layer.lora_A.grad is not None
            for part, a_RD in zip(layer.parts, layer.lora_A.grad.split(layer.config.rank), strict=True):
                grads[f"{part.name}.lora_A.weight"] = a_RD
                grads[f"{part.name}.lora_B.weight"] = layer.lora_B[part.short].grad
                if layer.config.dora:
                    grads[f"{part.name}.lora_magnitude_vector"] = layer.magnitude[part.short].grad
    return grads


def test_adapters_for_part_of_the_modules_go_back_to_peft(tmp_path: Path) -> None:
    """GPT-2 calls two matrices c_proj; adapters on one of them must not become adapters on both."""
    base = base_folder("gpt2", tmp_path / "base")
    theirs = stirred(peft_model(base, "gpt2", target_modules=["attn.c_proj"]))
    theirs.save_pretrained(tmp_path / "adapter")
    ours = models.load_adapters(models.load(base), tmp_path / "adapter")
    models.save_adapters(ours, tmp_path / "again", base=base)
    back = theirs_on(base, tmp_path / "again")
    assert {name for name, _ in back.named_parameters()} == {name for name, _ in theirs.named_parameters()}
    with torch.no_grad():
        assert (back(tokens()).logits - theirs.eval()(tokens()).logits).abs().max() <= 1e-6
