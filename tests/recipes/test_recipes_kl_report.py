"""Recipes that do not sample say what KL they have spent: the same as measured by hand, once, and for adapters too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from posttrain import models
from posttrain.core import Example, Task, TokenSequence
from posttrain.recipes.adapters import Lora, tuned_part
from posttrain.recipes.distill import distill
from posttrain.recipes.dpo import dpo
from posttrain.recipes.kl_report import prompts_of, report_kl
from posttrain.recipes.kl_spent import kl_spent_sync
from posttrain.recipes.kto import kto
from posttrain.recipes.policy import Policy, load_policy
from posttrain.recipes.pretrain import new_policy
from posttrain.recipes.sft import sft
from posttrain.recipes.workbench import Workbench

TASKS = [Task(id=f"t{number}", prompt=f"be {number}") for number in range(4)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kl") / "base"
    sizes = {"vocab_size": 262, "width": 32, "num_layers": 1, "num_heads": 2, "max_positions": 64}
    new_policy(["to be or not to be"], **sizes, seed=0, path=path).save(path)
    return path


def moved(policy: Policy) -> Policy:
    """Learned something: every weight that learns is another."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
    return policy


def test_prompts_are_what_stands_before_the_answer_each_once() -> None:
    def example(name: str, *sequences: tuple[tuple[int, ...], int]) -> Example:
        made = (
            TokenSequence(tokens=tokens, mask=(False,) * at + (True,) * (len(tokens) - at)) for tokens, at in sequences
        )
        return Example(id=name, sequences=tuple(made))

    whole_text = example("orpo", ((1, 2, 3, 4), 1), ((1, 2, 5), 2))  # the chosen side's prompt is a target as well
    given = [example("a", ((1, 2, 9), 2)), whole_text, example("b", ((7, 8), 1))]
    assert sorted(prompts_of(given).values()) == [(1, 2), (7,)]


def test_it_is_the_kl_to_the_folder_and_measured_once(bench: Workbench, base: Path) -> None:
    policy, start = moved(load_policy(str(base))), load_policy(str(base))
    found = report_kl(bench, policy, TASKS, num_prompts=3, max_tokens=5)
    by_hand = kl_spent_sync(policy, start.model, sorted(TASKS, key=lambda task: task.id), max_tokens=5)
    assert found["kl_spent/num_prompts"] == 3
    assert found["kl_spent/per_answer"] > 0.01
    everything = report_kl(bench, policy, TASKS, num_prompts=4, max_tokens=5)
    assert everything == found, "it was measured before"
    (bench.run.path / "kl_spent.json").unlink()
    everything = report_kl(bench, policy, TASKS, num_prompts=4, max_tokens=5)
    assert everything == pytest.approx(by_hand.metrics(), rel=0.5), "the same prompts, in another order"
    assert report_kl(bench, policy, [], num_prompts=4) == everything


def test_without_adapters_is_the_reference(bench: Workbench, base: Path) -> None:
    policy = tuned_part(load_policy(str(base)), Lora(rank=4), seed=0)
    assert report_kl(bench, policy, TASKS, num_prompts=4, max_tokens=5)["kl_spent/k3"] == pytest.approx(0, abs=1e-7)
    (bench.run.path / "kl_spent.json").unlink()
    moved(policy)
    found = report_kl(bench, policy, TASKS, num_prompts=4, max_tokens=5)
    merged = load_policy(str(policy.save(bench.run.path / "merged")))
    hand = kl_spent_sync(merged, load_policy(str(base)).model, TASKS, max_tokens=5)
    assert found["kl_spent/k3"] > 1e-3
    assert found["kl_spent/per_answer"] == pytest.approx(hand.per_answer, rel=0.2)


def test_nothing_to_measure_is_said(bench: Workbench, base: Path) -> None:
    policy = load_policy(str(base))
    assert report_kl(bench, policy, TASKS, num_prompts=0) == {}
    too_long = Task(id="long", prompt="be " * 100)
    assert report_kl(bench, policy, [too_long], num_prompts=4) == {}
    assert not (bench.run.path / "kl_spent.json").exists()


def test_every_offline_recipe_reports_it(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = tmp_path / "pairs.jsonl"
    lines = [{"prompt": f"be {n}", "chosen": " or", "rejected": " not"} for n in range(12)]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    both = {"model": str(base), "data": pairs, "dtype": "float32", "held_out": 2, "batch_size": 4, "runs": tmp_path}
    runs = {
        "sft": sft(**both, lr=1e-2),
        "sft, LoRA": sft(**both, lora_rank=2),
        "dpo, LoRA": dpo(**both, lora_rank=2),
        "orpo": dpo(**both, loss="orpo", lr=1e-2),
        "kto": kto(**both, lr=1e-2),
        "distill": distill(**both, teacher=str(base), lora_rank=2, max_tokens=4, loss="forward_kl"),
        "none": sft(**both, kl_prompts=0),
    }
    for name, run in runs.items():
        file = run / "kl_spent.json"
        assert file.exists() == (name != "none"), name
        if file.exists():
            assert json.loads(file.read_text())["kl_spent/num_prompts"] >= 3, name
        assert (run / "adapter" / "adapter_config.json").exists() == ("LoRA" in name or name == "distill"), name
        models.load(run / "model")
    assert capsys.readouterr().out.count("KL to the start, nats per answer") == len(runs) - 1
