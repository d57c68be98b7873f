"""The recipes as a user runs them, one on what the other made: pretrain, sft, grpo, evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.core import ConfigError, DataError, EvalReport, EvaluateError, RegistryError, UsageError, read_metrics
from posttrain.recipes.evaluate import evaluate
from posttrain.recipes.grpo import grpo
from posttrain.recipes.policy import load_policy
from posttrain.recipes.pretrain import pretrain
from posttrain.recipes.sft import sft
from posttrain.registry import Registry, RunFolder

SIZES = {"vocab_size": 300, "width": 32, "num_layers": 1, "num_heads": 2, "max_length": 64, "lr": 1e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of three kinds."""
    folder = tmp_path_factory.mktemp("recipes")
    numbers = range(24)
    write(folder / "texts.jsonl", [{"text": f"{number} and one make {number + 1}."} for number in numbers])
    write(
        folder / "pairs.jsonl",
        [{"prompt": f"{number} and one make ", "completion": str(number + 1)} for number in numbers],
    )
    write(
        folder / "questions.jsonl",
        [{"question": f"{number} and one?", "answer": f"So.\n#### {number + 1}"} for number in numbers],
    )
    return folder


@pytest.fixture(scope="module")
def base(folder: Path) -> str:
    """A base model made of the texts."""
    path = pretrain.run_with(
        {
            "data": str(folder / "texts.jsonl"),
            "held_out": 4,
            "batch_size": 8,
            "epochs": 2,
            "runs": str(folder / "runs"),
            **SIZES,
        }
    )
    return str(path / "model")


def write(path: Path, values: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def parents_of(folder: Path, model: Path) -> list[str]:
    """Names of what a model was made from."""
    with Registry(folder / "runs" / "registry.db") as registry:
        known = next(item for item in registry.artifacts("model") if Path(item.path) == model.resolve())
        return sorted(registry.artifact(parent).name for parent in known.parents)


def test_pretrain_made_a_model_with_a_lineage(folder: Path, base: str) -> None:
    model = Path(base)
    assert load_policy(str(model)).model.config.width == 32
    assert parents_of(folder, model) == ["texts.jsonl"]
    run = RunFolder.open(model.parent, read_only=True)
    assert run.state.status == "finished"
    rows = read_metrics(run.path / "metrics.jsonl")
    assert rows[-1]["step"] == 6  # 20 documents by 8, twice
    assert rows[-1]["eval/nll"] < rows[0]["eval/nll"]


def test_pretrain_goes_on_with_a_model_and_says_so(folder: Path, base: str) -> None:
    path = pretrain.run_with(
        {
            "data": str(folder / "texts.jsonl"),
            "model": base,
            "held_out": 0,
            "name": "base-more",
            "runs": str(folder / "runs"),
            "lr": 1e-4,
        }
    )
    assert parents_of(folder, path / "model") == ["base", "texts.jsonl"]


def test_sft_grpo_and_evaluate_on_what_came_before(folder: Path, base: str, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {"runs": str(folder / "runs")}
    tuned = sft.run_with(
        {
            "model": base,
            "data": str(folder / "pairs.jsonl"),
            "held_out": 4,
            "epochs": 6,
            "batch_size": 8,
            "lr": 3e-3,
            **runs,
        }
    )
    assert "held-out loss" in capsys.readouterr().out
    assert parents_of(folder, tuned / "model") == ["base", "pairs.jsonl"]

    model = str(tuned / "model")
    own = folder / "own.py"
    own.write_text(
        "from posttrain.grade import Function\ndigits = Function(lambda t: sum(map(str.isdigit, t.text)) / 6)\n"
    )
    common = {"data": str(folder / "questions.jsonl"), "max_tokens": 6, **runs}
    path = grpo.run_with(
        {
            "model": model,
            "grader": f"{own}:digits",
            "steps": 2,
            "prompts_per_step": 4,
            "group_size": 2,
            "held_out": 4,
            **common,
        }
    )
    rows = read_metrics(path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 <= row["reward"] <= 1 and "rewards/lambda/mean" in row for row in rows)
    assert parents_of(folder, path / "model") == ["questions.jsonl", "sft"]
    samples = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * 2 * 2  # two groups a step
    assert {sample["grade"]["grader"] for sample in samples} == {"lambda"}

    report = evaluate.run_with({"model": model, "grader": "number", "limit": 10, **common})
    score = report.metrics["accuracy"]
    assert len(report.samples) == score.n == 10
    assert 0 <= score.low <= score.value <= score.high <= 1
    (written,) = (folder / "runs").glob("*-evaluate-*/report.json")
    assert EvalReport.from_json(written.read_bytes()) == report
    capsys.readouterr()
    evaluate.run_with({"model": model, "grader": "number", "limit": 10, "against": str(written), **common})
    assert "difference +0.0000 [+0.0000, +0.0000], wins 0, losses 0, ties 10, p = 1" in capsys.readouterr().out
    with Registry(folder / "runs" / "registry.db") as registry:
        assert registry.reports(report.model)[0].metrics == report.metrics
    with pytest.raises(EvaluateError, match="not the same tasks"):
        evaluate.run_with({"model": model, "grader": "number", "limit": 9, "against": str(written), **common})


def test_wrong_options_are_named(folder: Path) -> None:
    runs = folder / "more"
    with pytest.raises(ConfigError, match="has no option lerning_rate"):
        sft.run_with({"model": "m", "data": "d", "lerning_rate": 1.0})
    with pytest.raises(ConfigError, match="needs --model"):
        sft.run_with({"data": "d"})
    with pytest.raises(ConfigError, match="--dtype"):
        sft.run_with({"model": "m", "data": "d", "dtype": "int3"})
    assert not runs.exists()


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"grader": "exactly"}, UsageError, "no grader 'exactly'"),
        ({"data": "absent.jsonl"}, RegistryError, "absent.jsonl: no such file"),
        ({"held_out": 24}, ConfigError, "0 tasks"),
    ],
)
def test_grpo_says_what_is_wrong(
    folder: Path, base: str, tmp_path: Path, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    values = {
        "model": base,
        "data": str(folder / "questions.jsonl"),
        "steps": 1,
        "runs": str(tmp_path / "runs"),
    }
    with pytest.raises(error, match=said):
        grpo.run_with({**values, **changes})
    (run,) = (tmp_path / "runs").glob("*-grpo-*")
    assert RunFolder.open(run, read_only=True).state.status == "failed"


def test_rows_that_give_an_evaluation_task_away_are_dropped_and_counted(folder: Path, base: str) -> None:
    write(
        folder / "exam.jsonl", [{"prompt": "3 and one make", "answer": "4"}, {"prompt": "What else?", "answer": "no"}]
    )
    run = sft.run_with(
        {
            "model": base,
            "data": str(folder / "pairs.jsonl"),
            "evaluation": [str(folder / "exam.jsonl")],
            "held_out": 4,
            "epochs": 1,
            "runs": str(folder / "runs"),
        }
    )
    found = json.loads((run / "contamination.json").read_text())
    assert len(found["dropped"]) == 1
    assert len(found["clean"]) == 23
    assert found["sets"]["exam"]["num_matched"] == 1
    with Registry(folder / "runs" / "registry.db") as registry:
        source = next(item for item in registry.artifacts("dataset") if item.name == "pairs.jsonl")
        assert source.meta == {"contamination": {"exam": 0.0}, "dropped": 1}
    write(folder / "all.jsonl", [{"prompt": f"{number} and one make", "answer": "?"} for number in range(24)])
    with pytest.raises(DataError, match="all 24 training rows are in the evaluation files all"):
        sft.run_with(
            {
                "model": base,
                "data": str(folder / "pairs.jsonl"),
                "evaluation": [str(folder / "all.jsonl")],
                "runs": str(folder / "runs"),
            }
        )
