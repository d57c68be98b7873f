"""The native decoder against `transformers`, on random-initialised checkpoints of every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain import models

transformers = pytest.importorskip("transformers")

VOCAB = 97
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
CASES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 128,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt2-untied-inner": {
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_inner": 40,
        "n_positions": 128,
        "tie_word_embeddings": False,
        "activation_function": "relu",
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama": {**BASE, "model_type": "llama"},
    "llama-biased": {**BASE, "model_type": "llama", "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "llama-multi-query": {**BASE, "model_type": "llama", "num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    "llama3-tied": {
        **BASE,
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": {**LLAMA3, "rope_theta": 500000.0},
    },
    "llama-linear": {
        **BASE,
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0},
    },
    "mistral": {**BASE, "model_type": "mistral", "sliding_window": 9, "head_dim": 16},
    "mistral-no-window": {**BASE, "model_type": "mistral", "sliding_window": None},
    "qwen2": {**BASE, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-window": {**BASE, "model_type": "qwen2", **WINDOW},
    "qwen3": {**BASE, "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3-window-theta": {
        **BASE,
        **WINDOW,
        "model_type": "qwen3",
        "head_dim": 12,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "olmo2": {**BASE, "model_type": "olmo2"},
    "olmo2-tied-biased": {**BASE, "model_type": "olmo2", "attention_bias": True, "tie_word_embeddings": True},
}
every_case = pytest.mark.parametrize("case", sorted(CASES))


def reference(case: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of `transformers` whose norms and biases are not 1 and 0."""
    torch.manual_seed(sorted(CASES).index(case))
    values = dict(CASES[case])
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def random_tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits_of(model: Any, tokens_BT: torch.Tensor, **inputs: Any) -> torch.Tensor:
    out: torch.Tensor = model(tokens_BT, **inputs).logits.float()
    return out


@every_case
@torch.no_grad()
def test_logits_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    theirs = reference(case)
    theirs.save_pretrained(tmp_path)
    ours = models.load(tmp_path)
    tokens_BT = random_tokens(3, 61)  # past every window, past the original context of llama3
    expected = logits_of(theirs, tokens_BT)
    assert expected.std() > 0.3, "a model that says nothing would agree with anything"
    assert (ours(tokens_BT) - expected).abs().max() <= 1e-4


@every_case
@torch.no_grad()
def test_right_padding_and_packing_change_nothing(case: str, tmp_path: Path) -> None:
    theirs = reference(case)
    theirs.save_pretrained(tmp_path)
    ours = models.load(tmp_path)
    lengths = [23, 5, 61, 1, 40, 6]
    rows = [random_tokens(1, 61)[:, :length] + (11 * i) % 7 for i, length in enumerate(lengths)]
    rows = [row % VOCAB for row in rows]
    packed_BTV = ours(torch.cat(rows, 1), lengths=lengths)
    padded = torch.zeros(len(lengths), 61, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, (tokens, length) in enumerate(zip(rows, lengths, strict=True)):
        padded[row, :length], mask[row, :length] = tokens[0], 1
    padded_BTV = ours(padded)
    expected = logits_of(theirs, padded, attention_mask=mask)
    for row, part in enumerate(packed_BTV[0].split(lengths)):
        assert (padded_BTV[row, : lengths[row]] - expected[row, : lengths[row]]).abs().max() <= 1e-4
        assert (part - expected[row, : lengths[row]]).abs().max() <= 1e-4


@every_case
def test_transformers_loads_what_we_save(case: str, tmp_path: Path) -> None:
    theirs = reference(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = models.load(tmp_path / "theirs")
    models.save(ours, tmp_path / "ours", max_shard_size=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    back, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    tokens_BT = random_tokens(2, 40)
    assert (logits_of(back.eval(), tokens_BT) - logits_of(theirs, tokens_BT)).abs().max() <= 1e-5
    again = models.load(tmp_path / "ours")
    for (name, mine), (_, read) in zip(ours.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(mine, read), name


@every_case
def test_bf16_survives_bit_for_bit(case: str, tmp_path: Path) -> None:
    reference(case, torch.bfloat16).save_pretrained(tmp_path / "theirs")
    models.save(models.load(tmp_path / "theirs", dtype="auto"), tmp_path / "ours")
    before = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype="auto").state_dict()
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto").state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == torch.bfloat16, name
        assert torch.equal(tensor, after[name]), name


@every_case
@torch.no_grad()
def test_bf16_is_at_least_as_near_to_fp32_as_transformers_is(case: str, tmp_path: Path) -> None:
    theirs = reference(case, torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    tokens_BT = random_tokens(2, 40)
    exact = models.load(tmp_path, dtype="float32")(tokens_BT).log_softmax(-1)
    ours = models.load(tmp_path, dtype="bfloat16")(tokens_BT)
    assert ours.dtype == torch.float32
    our_error = (ours.log_softmax(-1) - exact).pow(2).mean().sqrt()
    their_error = (logits_of(theirs, tokens_BT).log_softmax(-1) - exact).pow(2).mean().sqrt()
    assert our_error <= 1.02 * their_error


@pytest.mark.parametrize("case", ["llama3-tied", "qwen2-window", "llama-linear"])
@torch.no_grad()
def test_config_of_transformers_4_is_read_the_same(case: str, tmp_path: Path) -> None:
    theirs = reference(case)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    values["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    values["torch_dtype"] = values.pop("dtype")
    values.pop("layer_types", None)  # 4.x before layer_types: max_window_layers alone says which layers slide
    new = models.DecoderConfig.from_hf(json.loads(path.read_text()))
    path.write_text(json.dumps(values))
    assert models.DecoderConfig.from_hf(values) == new
    tokens_BT = random_tokens(1, 61)
    assert (models.load(tmp_path)(tokens_BT) - logits_of(theirs, tokens_BT)).abs().max() <= 1e-4


@pytest.mark.parametrize("case", ["gpt2", "llama", "qwen3", "olmo2"])
def test_gradients_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    theirs = reference(case)
    theirs.save_pretrained(tmp_path)
    ours = models.load(tmp_path)
    tokens_BT = random_tokens(2, 17)
    targets = tokens_BT[:, 1:].flatten()
    scores = theirs(tokens_BT).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(scores, targets).backward()
    stats = models.token_stats(ours, ours.hidden(tokens_BT)[:, :-1].flatten(0, 1), targets)
    (-stats.logprobs_N.mean()).backward()
    grads = {name: parameter.grad for name, parameter in ours.named_parameters()}
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for entry in models.weight_table(ours.config):
        parts = [expected[name].T if entry.transposed else expected[name] for name in entry.theirs]
        assert torch.allclose(grads[entry.ours], torch.cat(parts), atol=2e-5, rtol=1e-4), entry.ours
