"""Adapters in recipes: the policy that trains them, the sampler that sees them, what is saved and how it resumes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain import models
from posttrain.core import ConfigError, Example, ModelError, Sampling, TokenSequence, read_metrics
from posttrain.engine import LocalEngine
from posttrain.recipes.adapters import Lora, reference_of, save_tuned, tuned_part
from posttrain.recipes.policy import Policy, load_policy
from posttrain.recipes.pretrain import pretrain
from posttrain.recipes.sft import sft
from posttrain.registry import Registry
from posttrain.train import TrainConfig, Trainer, load_latest, nll_objective, save_checkpoint

SIZES = {"vocab_size": 300, "width": 32, "num_layers": 2, "num_heads": 2, "max_length": 64, "lr": 1e-2}
RANK4 = Lora(rank=4, alpha=8.0)


def copy_of(policy: Policy) -> Policy:
    return Policy(copy.deepcopy(policy.model), policy.tokenizer, policy.renderer, policy.path)


def texts(policy: Policy, lines: list[str]) -> list[Example]:
    examples = []
    for number, line in enumerate(lines):
        tokens = tuple(policy.tokenizer.encode(line))
        mask = (False,) + (True,) * (len(tokens) - 1)
        examples.append(Example(id=f"line-{number}", sequences=(TokenSequence(tokens=tokens, mask=mask),)))
    return examples


LINES = ["to be or not to be", "be or not", "not to be to be"]


def trained(policy: Policy, steps: int = 30, **settings: Any) -> Trainer:
    trainer = Trainer(policy.model, TrainConfig(lr=2e-2, **settings), nll_objective)
    for _ in range(steps):
        trainer.step(texts(policy, LINES))
    return trainer


# The sampler


@pytest.mark.parametrize("dora", [False, True])
def test_the_sampler_sees_what_the_adapters_learn(tiny_policy: Policy, dora: bool) -> None:
    policy = tuned_part(copy_of(tiny_policy), RANK4.replace(dora=dora))
    prompt = policy.tokenizer.encode("to be")
    greedy = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
    with LocalEngine(policy.model, policy.tokenizer, max_batch=4) as engine:
        before = engine.generate([prompt], greedy)[0]
        trainer = trained(policy)
        engine.update_weights(policy.model, version=1)
        after = engine.generate([prompt], greedy)[0]
        drawn = engine.generate([prompt], Sampling(max_tokens=12, n=3, seed=1, ignore_eos=True))
    assert before.text != after.text
    assert after.text.startswith(" or not to be")
    for completion in [after, *drawn]:
        tokens = (*prompt, *completion.tokens)
        mask = (False,) * len(prompt) + (True,) * len(completion.tokens)
        example = Example(id="sampled", sequences=(TokenSequence(tokens=tokens, mask=mask),))
        expected = torch.tensor(trainer.logprobs([example])[0][0][len(prompt) :])
        assert (torch.tensor(completion.policy_logprobs) - expected).abs().max() <= 1e-5


def test_a_copy_in_bf16_sees_them_after_an_update(tiny_policy: Policy) -> None:
    policy = tuned_part(copy_of(tiny_policy), RANK4)
    prompt = policy.tokenizer.encode("to be")
    greedy = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
    with policy.engine(slots=4, dtype="bfloat16", inline=True) as engine:
        before = engine.generate([prompt], greedy)[0]
        trained(policy)
        stale = engine.generate([prompt], greedy)[0]
        engine.update_weights(policy.model, version=1)
        after = engine.generate([prompt], greedy)[0]
        models.merge_adapters(policy.model)
        engine.update_weights(policy.model, version=2)
        merged = engine.generate([prompt], greedy)[0]
    assert stale.tokens == before.tokens
    assert after.text.startswith(" or not to be")
    assert merged.tokens == after.tokens
    assert (after.weight_version, merged.weight_version) == (1, 2)


def test_an_engine_made_before_the_adapters_takes_them(tiny_policy: Policy) -> None:
    policy = copy_of(tiny_policy)
    greedy = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
    with policy.engine(slots=4, dtype="bfloat16", inline=True) as engine:
        tuned_part(policy, RANK4)
        trained(policy)
        engine.update_weights(policy.model, version=1)
        assert engine.generate(["to be"], greedy)[0].text.startswith(" or not to be")


# The reference


def test_the_reference_is_the_policy_before_training(tiny_policy: Policy) -> None:
    policy = tuned_part(copy_of(tiny_policy), RANK4)
    trainer = Trainer(policy.model, TrainConfig(lr=2e-2), nll_objective)
    examples = texts(policy, LINES)
    start = trainer.logprobs(examples)
    reference = reference_of(policy, trainer)
    for _ in range(3):
        trainer.step(examples)
    assert trainer.logprobs(examples) != start
    assert reference.logprobs(examples) == start
    whole = copy_of(tiny_policy)
    trainer = Trainer(whole.model, TrainConfig(lr=2e-2), nll_objective)
    reference = reference_of(whole, trainer)
    trainer.step(examples)
    assert trainer.logprobs(examples) != start
    assert reference.logprobs(examples) == start


def test_the_reference_of_adapters_that_go_on_has_them(tiny_policy: Policy, tmp_path: Path) -> None:
    policy = tuned_part(Policy(*vars(copy_of(tiny_policy)).values()), RANK4)
    policy = Policy(policy.model, policy.tokenizer, policy.renderer, policy.path, base=tmp_path / "base")
    policy.save(tmp_path / "base")
    tiny_policy.save(tmp_path / "base")
    trained(policy)
    save_tuned(policy, tmp_path / "model")
    again = tuned_part(load_policy(str(tmp_path / "adapter")), Lora())
    trainer = Trainer(again.model, TrainConfig(lr=2e-2), nll_objective)
    examples = texts(again, LINES)
    start = trainer.logprobs(examples)
    reference = reference_of(again, trainer)
    trainer.step(examples)
    assert reference.logprobs(examples) == start, "not the base without adapters"


# Saved, loaded, resumed


@pytest.fixture
def saved(tiny_policy: Policy, tmp_path: Path) -> Policy:
    """A base on disk, and a policy with trained adapters on it."""
    tiny_policy.save(tmp_path / "base")
    policy = tuned_part(load_policy(str(tmp_path / "base")), RANK4)
    trained(policy)
    save_tuned(policy, tmp_path / "model")
    return policy


def test_adapter_folders_and_merged_folders_are_policies(saved: Policy, tmp_path: Path) -> None:
    tokens = torch.tensor([saved.tokenizer.encode("to be or not")])
    expected = saved.model.eval()(tokens)
    adapter, merged = load_policy(str(tmp_path / "adapter")), load_policy(str(tmp_path / "model"))
    assert torch.equal(adapter.model(tokens), expected)
    torch.testing.assert_close(merged.model(tokens), expected, atol=1e-4, rtol=1e-4)
    assert not models.has_adapters(merged.model)
    both = load_policy(str(tmp_path / "base"), adapter=tmp_path / "adapter")
    assert torch.equal(both.model(tokens), expected)
    assert (adapter.path, adapter.base) == (tmp_path / "adapter", tmp_path / "base")
    assert adapter.tokenizer.encode("to be") == saved.tokenizer.encode("to be")
    with pytest.raises(ModelError, match="Give the base model"):
        load_policy(str(tmp_path / "adapter"), adapter=tmp_path / "adapter")


def test_new_adapters_go_on_top_of_old_ones(saved: Policy, tmp_path: Path) -> None:
    policy = load_policy(str(tmp_path / "adapter"))
    tokens = torch.tensor([policy.tokenizer.encode("to be or not")])
    before = policy.model(tokens)
    policy = tuned_part(policy, RANK4.replace(rank=2))
    torch.testing.assert_close(policy.model(tokens), before, atol=1e-4, rtol=1e-4)
    assert models.adapter_config(policy.model) == models.LoraConfig(rank=2, alpha=8.0)
    save_tuned(policy, tmp_path / "second" / "model")
    assert not (tmp_path / "second" / "adapter").exists(), "no folder holds the base that these are on"
    assert (tmp_path / "second" / "model" / "config.json").exists()


def test_a_checkpoint_holds_adapters_alone_and_resumes_exactly(tiny_policy: Policy, tmp_path: Path) -> None:
    def start() -> tuple[Policy, Trainer]:
        policy = tuned_part(copy_of(tiny_policy), RANK4.replace(dropout=0.2, dora=True))
        return policy, Trainer(policy.model, TrainConfig(lr=1e-2, seed=3), nll_objective)

    policy, trainer = start()
    for step in range(6):
        trainer.step(texts(policy, LINES))
        if step == 2:
            save_checkpoint(tmp_path, trainer)
    other, resumed = start()
    assert load_latest(tmp_path, resumed) is not None
    for _ in range(3):
        resumed.step(texts(other, LINES))
    mine, theirs = policy.model.state_dict(), other.model.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in mine.items())
    assert set(trainer.state().weights) == {
        name for name, weight in policy.model.named_parameters() if weight.requires_grad
    }


def test_options_are_read_and_checked(tiny_policy: Policy) -> None:
    options = {"lora_rank": 8, "lora_targets": ("q_proj",), "rslora": True, "lr": 1.0, "model": "x"}
    lora = Lora.of(options)
    assert lora == Lora(rank=8, targets=("q_proj",), rslora=True)
    assert (lora.lr(None, 5e-6), lora.lr(1e-3, 5e-6), Lora().lr(None, 5e-6)) == (pytest.approx(5e-5), 1e-3, 5e-6)
    with pytest.raises(ConfigError, match="give the adapters a rank"):
        tuned_part(copy_of(tiny_policy), Lora(four_bit=True))
    with pytest.raises(ConfigError, match="no target nonsense"):
        tuned_part(copy_of(tiny_policy), Lora(rank=2, targets=("nonsense",)))
    policy = copy_of(tiny_policy)
    assert tuned_part(policy, Lora()) is policy


# The recipe


def write(path: Path, values: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    write(folder / "texts.jsonl", [{"text": f"{number} and one make {number + 1}."} for number in range(12)])
    write(
        folder / "pairs.jsonl",
        [{"prompt": f"{number} and one make ", "completion": "and one"} for number in range(24)],
    )
    return folder


@pytest.fixture(scope="module")
def base(folder: Path) -> str:
    given = {"data": str(folder / "texts.jsonl"), "held_out": 2, "epochs": 20, "runs": str(folder / "runs"), **SIZES}
    return str(pretrain.run_with(given) / "model")


def run_sft(folder: Path, model: str, **options: Any) -> Path:
    common = {"data": str(folder / "pairs.jsonl"), "held_out": 4, "epochs": 8, "batch_size": 8, "dtype": "float32"}
    path: Path = sft.run_with({"model": model, "runs": str(folder / "runs"), **common, **options})
    return path


def improvement(run: Path) -> float:
    rows = [row["eval/nll"] for row in read_metrics(run / "metrics.jsonl") if "eval/nll" in row]
    return rows[0] - rows[-1]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(models.load(path).state_dict())


def test_sft_with_adapters(folder: Path, base: str) -> None:
    run = run_sft(folder, base, lora_rank=4, lora_alpha=4.0, lr=1e-2, neftune_alpha=0.5, rslora=True, name="adapted")
    assert improvement(run) > 0.3
    adapter = load_policy(str(run / "adapter"))
    config = models.adapter_config(adapter.model)
    assert config is not None
    assert config.replace(targets=()) == models.LoraConfig(rank=4, alpha=4.0, rslora=True)
    assert len(config.targets) == 7, "the file names all that are adapted"
    before, merged = weights(Path(base)), weights(run / "model")
    assert torch.equal(before["embed.weight"], merged["embed.weight"])
    assert not torch.equal(before["layers.0.mlp.up.weight"], merged["layers.0.mlp.up.weight"])
    again = run_sft(folder, str(run / "adapter"), lr=1e-2, epochs=2, name="adapted-more")
    assert models.is_adapter_folder(again / "adapter")
    assert Path(models.base_of(again / "adapter")) == Path(base), "adapters that went on are of the first base"
    with Registry(folder / "runs" / "registry.db") as registry:
        made = next(item for item in registry.artifacts("model") if Path(item.path) == (again / "model").resolve())
        paths = {Path(registry.artifact(parent).path).resolve() for parent in made.parents}
    assert paths == {Path(base).resolve(), (run / "adapter").resolve(), (folder / "pairs.jsonl").resolve()}


def test_sft_above_a_frozen_prefix(folder: Path, base: str) -> None:
    run = run_sft(folder, base, freeze_layers=1, lr=1e-2, normalise="sequence")
    before, after = weights(Path(base)), weights(run / "model")
    assert torch.equal(before["embed.weight"], after["embed.weight"])
    frozen = [name for name in before if name.startswith("layers.0.")]
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["final_norm.weight"], after["final_norm.weight"])
    assert not (run / "adapter").exists()
    assert improvement(run) > 0
