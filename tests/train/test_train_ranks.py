"""Two processes that share a step's examples do what one does with all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from posttrain import train
from posttrain.core import ConfigError
from posttrain.train.batch import Denominators, StepCounts
from posttrain.train.rows import to_rows

SCRIPT = Path(__file__).with_name("ranks_run.py")


class Found:
    """What the processes wrote."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.numbers = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(size)]

    def weights(self, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{name}-{rank}.safetensors")


def start(folder: Path, size: int) -> list[subprocess.Popen[str]]:
    folder.mkdir()
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(size), str(folder / "store"), str(folder)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found]:
    """The scenarios in one process, and in two."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [*start(folder / "one", 1), *start(folder / "two", 2)]
    for process in processes:
        _, complaint = process.communicate(timeout=120)
        assert process.returncode == 0, complaint[-3000:]
    return Found(folder / "one", 1), Found(folder / "two", 2)


@pytest.mark.parametrize("name", ["nll", "sum", "sequence", "group", "lora", "none", "dead"])
def test_two_processes_are_one(found: tuple[Found, Found], name: str) -> None:
    one, two = found
    expected = one.weights(name)
    for rank in range(2):
        weights = two.weights(name, rank)
        assert weights.keys() == expected.keys()
        for key, weight in expected.items():
            torch.testing.assert_close(weights[key], weight, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    for key, weight in two.weights(name, 1).items():
        assert torch.equal(weight, two.weights(name, 0)[key]), f"{key}: the ranks drift apart"


@pytest.mark.parametrize("name", ["nll", "sum", "sequence", "group", "lora", "none", "dead"])
def test_the_gradient_is_the_sum(found: tuple[Found, Found], name: str) -> None:
    one, two = found
    expected = one.weights(f"{name}-gradient")
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for rank in range(2):
        gradient = two.weights(f"{name}-gradient", rank)
        assert gradient.keys() == expected.keys()
        for key, grad in expected.items():
            torch.testing.assert_close(gradient[key], grad, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("name", ["nll", "sum", "sequence", "group", "lora", "none", "dead"])
def test_metrics_are_of_all_examples_and_the_same_on_every_rank(found: tuple[Found, Found], name: str) -> None:
    one, two = found
    expected, first, second = one.numbers[0][name], two.numbers[0][name], two.numbers[1][name]
    assert first == second
    assert first.keys() == expected.keys()
    for key in expected.keys() - {"num_micro_batches"}:
        assert first[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key
    if f"{name}-eval" in one.numbers[0]:
        held_out = two.numbers[1][f"{name}-eval"]
        assert held_out == two.numbers[0][f"{name}-eval"]
        assert held_out == pytest.approx(one.numbers[0][f"{name}-eval"], rel=1e-4)


def test_the_step_did_something(found: tuple[Found, Found]) -> None:
    nll = found[0].numbers[0]["nll"]
    assert nll["grad_norm"] > 0.1
    assert found[0].numbers[0]["sum"]["grad_norm"] > 10 * nll["grad_norm"]


def test_a_loss_that_is_not_finite_on_one_rank_stops_both(found: tuple[Found, Found]) -> None:
    first, second = (numbers["nan"] for numbers in found[1].numbers)
    assert first == second
    assert "loss nan" in first
    assert "caused by examples poison." in first, "only one rank has the example, both name it"
    for key, weight in found[1].weights("nan", 0).items():
        assert torch.equal(weight.nan_to_num(), found[1].weights("nan", 1)[key].nan_to_num()), key


def test_a_wrong_example_on_one_rank_stops_both(found: tuple[Found, Found]) -> None:
    first, second = (numbers["malformed"] for numbers in found[1].numbers)
    assert first == second
    assert "rank 0: example 'outside': token id 99 is outside" in first


def test_no_example_anywhere_is_an_error_everywhere(found: tuple[Found, Found]) -> None:
    first, second = (numbers["all-dead"] for numbers in found[1].numbers)
    assert first == second
    assert "none of its 4 examples has a target" in first


def test_counts_of_groups_that_ranks_share(make_examples: Any) -> None:
    examples = make_examples(6, group_size=3)
    examples[5] = examples[5].replace(group="")
    whole = StepCounts.of(to_rows(examples))
    parts = [StepCounts.of(to_rows(examples[rank::2])) for rank in range(2)]
    both = [StepCounts.over(parts, rank) for rank in range(2)]
    assert whole.denominators.groups == 3
    for counts in both:
        assert counts.denominators == whole.denominators
        assert isinstance(counts.denominators, Denominators)
        assert counts.num_examples == 6
        assert counts.num_tokens == whole.num_tokens
    assert both[1].groups == whole.groups, "the example without a group is the second rank's"
    assert both[0].groups == {key: num for key, num in whole.groups.items() if key.startswith("group:")}


def test_ranks_need_processes() -> None:
    with pytest.raises(ConfigError, match="not initialised"):
        train.Ranks()
    with pytest.raises(ConfigError, match="start the processes with torchrun"):
        train.Ranks.from_environment()
