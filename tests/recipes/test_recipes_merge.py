"""The merge recipe: a model folder with all its parents in the registry."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from posttrain import models
from posttrain.core import ConfigError, ModelError
from posttrain.recipes.merge import merge
from posttrain.recipes.policy import load_policy
from posttrain.recipes.pretrain import new_policy
from posttrain.registry import Registry


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("merge")
    sizes = {"vocab_size": 262, "width": 32, "num_layers": 1, "num_heads": 2, "max_positions": 64}
    return [str(new_policy(["to be"], seed=seed, path=folder, **sizes).save(folder / f"m{seed}")) for seed in range(3)]


def test_a_merged_model_knows_all_its_parents(folders: list[str], tmp_path: Path) -> None:
    run = merge.run_with(
        {
            "models": tuple(folders[:2]),
            "base": folders[2],
            "method": "ties",
            "density": 0.5,
            "name": "soup",
            "runs": str(tmp_path / "runs"),
        }
    )
    assert load_policy(str(run / "model")).tokenizer.encode("to be")
    with Registry(tmp_path / "runs" / "registry.db") as registry:
        card = next(item for item in registry.artifacts("model") if item.name == "soup")
        parents = {Path(registry.artifact(parent).path).resolve() for parent in card.parents}
    assert parents == {Path(folder).resolve() for folder in folders}
    assert card.meta["merge"]["method"] == "ties"


def test_an_average_is_one(folders: list[str], tmp_path: Path) -> None:
    run = merge.run_with({"models": tuple(folders[:2]), "weights": (1.0, 3.0), "runs": str(tmp_path / "runs")})
    first, second, merged = (models.load(path).state_dict() for path in [*folders[:2], run / "model"])
    for name, weight in merged.items():
        torch.testing.assert_close(weight, 0.25 * first[name] + 0.75 * second[name], rtol=1e-5, atol=1e-6)


def test_what_cannot_be_merged(folders: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs the base model"):
        merge.run_with({"models": tuple(folders[:2]), "method": "task", "runs": str(tmp_path / "runs")})
    with pytest.raises(ModelError, match="no such model folder"):
        merge.run_with({"models": (folders[0], "./nowhere"), "runs": str(tmp_path / "runs")})
