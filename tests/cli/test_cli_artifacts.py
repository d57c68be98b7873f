"""`posttrain runs`, `show`, `promote` and `rollback`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.core import EvalReport, EvalSample, Grade, Sampling, StopReason, Task
from posttrain.evaluate import report_metrics
from posttrain.registry import Registry, RunFolder

NUM = 60


def report_of(model: str, num_right: int, *, suite: str = "sums", first: int = 0) -> EvalReport:
    """A report on 60 tasks of which the first `num_right` are answered well."""
    samples = tuple(
        EvalSample(
            task=Task(id=f"{suite}-{first + place}", prompt="?"),
            index=0,
            text="x",
            grade=Grade(score=float(place < num_right), grader="exact"),
            stop_reason=StopReason.EOS,
            num_tokens=1,
        )
        for place in range(NUM)
    )
    return EvalReport(
        suite=suite,
        suite_hash=f"{suite}{first}",
        model=model,
        sampling=Sampling(temperature=0.0),
        metrics=report_metrics(samples, (1,)),
        samples=samples,
    )


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A registry with a data set and the models good (50 of 60 right), better (58), worse (20), unknown (no report)."""
    root = tmp_path / "runs"
    run = RunFolder.create(root, "sft", {"lr": 1e-4, "data": Path("rows.jsonl")}, run_id="20260101-000000-sft-aaaa")
    run.tracker.log({"loss": 2.5, "reward": float("nan")}, step=1)
    run.tracker.log({"loss": 1.25}, step=2)
    run.event("note", text="half way")
    (run.checkpoints / "step-00000002").mkdir()
    run.finish()
    with Registry(root / "registry.db") as registry:
        registry.add_run(run)
        data = registry.add_artifact(b"rows", kind="dataset", name="rows.jsonl")
        for name, right in (("good", 50), ("better", 58), ("worse", 20), ("unknown", None)):
            made = registry.add_artifact(name.encode(), kind="model", name=name, parents=[data.id], run=run.id)
            if right is not None:
                registry.add_report(report_of(made.id, right), made.id)
    return root


def test_runs_are_listed_newest_last_and_damage_hides_nothing(
    posttrain: Callable[..., Any], runs: Path, tmp_path: Path
) -> None:
    later = RunFolder.create(runs, "grpo", {}, run_id="20260102-000000-grpo-bbbb")
    later.tracker.log({"reward": 0.5, "loss": 0.1}, step=1)
    with (later.path / "metrics.jsonl").open("ab") as file:
        file.write(b'not a line\n{"step": 2, "reward": 0.75, "eval/accuracy": 0.5}\n{"step": 3, "rew')
    later.close()  # as if its process had been killed
    broken = runs / "20260103-000000-dpo-cccc"
    broken.mkdir()
    (broken / "run.json").write_text("{")
    listed = posttrain("runs", "--runs", runs, "--json")
    assert listed.code == 0
    damaged, first, second = listed.json()
    assert (first["id"], first["status"], first["loss"], first["reward"]) == (
        "20260101-000000-sft-aaaa",
        "finished",
        1.25,
        None,
    )
    assert (second["recipe"], second["status"], second["step"], second["reward"]) == ("grpo", "interrupted", 2, 0.75)
    assert (second["loss"], second["accuracy"]) == (0.1, 0.5)
    assert (damaged["status"], "not a valid RunState" in damaged["damage"]) == ("damaged", True)
    lines = posttrain("runs", "--runs", runs).out.splitlines()
    assert lines[0].split("\t")[:3] == ["run", "recipe", "status"]
    assert lines[-1].startswith("20260103-000000-dpo-cccc: ")
    assert [run["id"] for run in posttrain("runs", "--runs", runs, "--limit", 1, "--json").json()] == [second["id"]]
    assert posttrain("show", broken.name, "--runs", runs).code == 0
    assert posttrain("runs", "--runs", tmp_path / "absent").out == f"no runs in {tmp_path / 'absent'}\n"


def test_show_a_run(posttrain: Callable[..., Any], runs: Path) -> None:
    said = posttrain("show", "20260101", "--runs", runs)
    assert said.code == 0
    for part in (
        "recipe sft, finished",
        "lr\t0.0001",
        "loss\t1.25",
        "step-00000002",
        'text="half way"',
        "model better",
    ):
        assert part in said.out
    plain = posttrain("show", "sft-aaaa", "--runs", runs, "--json").json()
    assert plain["config"] == {"lr": 0.0001, "data": "rows.jsonl"}
    assert (plain["metrics"]["loss"], plain["checkpoints"]) == (1.25, ["step-00000002"])
    assert [event["kind"] for event in plain["events"]] == ["started", "note", "finished"]
    assert posttrain("show", runs / "20260101-000000-sft-aaaa", "--runs", runs).out == said.out


def test_show_a_model_with_intervals_lineage_and_promotions(posttrain: Callable[..., Any], runs: Path) -> None:
    assert posttrain("promote", "good", "--project", "shop", "--runs", runs).code == 0
    said = posttrain("show", "good", "--runs", runs)
    for part in (
        "champion of shop",
        "accuracy\t83.3 % [",
        "└─ dataset rows.jsonl",
        "run 20260101-000000-sft-aaaa",
        "promoted",
    ):
        assert part in said.out
    plain = posttrain("show", "good", "--runs", runs, "--json").json()
    prefix = plain["artifact"]["id"][:8]
    assert posttrain("show", prefix, "--runs", runs).out == said.out
    assert plain["champion_of"] == ["shop"]
    report = posttrain("show", "good/eval/sums", "--runs", runs)
    assert (report.code, "accuracy\t83.3 %" in report.out) == (0, True)


def test_show_says_what_is_near(posttrain: Callable[..., Any], runs: Path) -> None:
    said = posttrain("show", "bettr", "--runs", runs)
    assert said.code == 1
    assert "no run in" in said.err
    assert "Near ones: better" in said.err
    RunFolder.create(runs, "sft", {}, run_id="20260101-000000-sft-bbbb").finish()
    assert "ambiguous" in posttrain("show", "20260101", "--runs", runs).err
    assert posttrain("show", "20260101-000000-sft-bbbb", "--runs", runs).code == 0


def champion(runs: Path) -> str:
    with Registry(runs / "registry.db") as registry:
        card = registry.champion("shop")
        return "" if card is None else card.name


def test_promotion_goes_through_the_gate_and_back(posttrain: Callable[..., Any], runs: Path) -> None:
    words = ("--project", "shop", "--runs", runs)
    first = posttrain("promote", "worse", *words)
    assert (first.code, "promoted: worse" in first.out) == (0, True)
    second = posttrain("promote", "good", *words, "--suite", "sums")
    assert second.code == 0
    assert "difference +0.5000" in second.out
    assert "wins 30, losses 0, ties 30" in second.out
    refused = posttrain("promote", "worse", *words)
    assert refused.code == 3
    assert "was not promoted" in refused.err
    assert "lower bound must be above" in refused.err
    assert champion(runs) == "good"
    assert "already" in posttrain("promote", "good", *words).out
    strict = posttrain("promote", "better", *words, "--min-difference", 0.2)
    assert (strict.code, "must be above +0.2000" in strict.err) == (3, True)
    assert posttrain("promote", "better", *words).code == 0
    back = posttrain("rollback", *words, "--reason", "complaints")
    assert (back.code, "good" in back.out) == (0, True)
    assert champion(runs) == "good"
    assert posttrain("rollback", *words, "--to", "worse").code == 0
    assert champion(runs) == "worse"
    history = posttrain("show", "good", "--runs", runs).out
    assert "rolled back" in history
    assert "complaints" in history


def test_promotion_needs_reports_on_the_same_tasks_or_force_with_a_reason(
    posttrain: Callable[..., Any], runs: Path
) -> None:
    words = ("--project", "shop", "--runs", runs)
    none = posttrain("promote", "unknown", *words)
    assert (none.code, "has no evaluation report" in none.err) == (3, True)
    elsewhere = posttrain("promote", "good", *words, "--suite", "maths")
    assert (elsewhere.code, "no report on suite 'maths'" in elsewhere.err) == (1, True)
    assert posttrain("promote", "good", *words).code == 0
    unlike = posttrain("promote", "unknown", *words)
    assert unlike.code == 1
    assert "no reports on the same tasks" in unlike.err
    assert "sums (sums0)" in unlike.err
    silent = posttrain("promote", "unknown", *words, "--force")
    assert (silent.code, "--reason" in silent.err) == (2, True)
    forced = posttrain("promote", "unknown", *words, "--force", "--reason", "the only one that fits")
    assert (forced.code, "overruled" in forced.out) == (0, True)
    assert champion(runs) == "unknown"
    assert posttrain("promote", "absent", *words).code == 1
    assert "no registry here" in posttrain("rollback", "--project", "shop", "--runs", runs / "absent").err


def test_the_newest_reports_on_common_tasks_are_compared(posttrain: Callable[..., Any], runs: Path) -> None:
    with Registry(runs / "registry.db") as registry:
        for name, first, right in (("good", 100, 30), ("better", 100, 50), ("better", 200, 0)):
            made = registry.artifact(name)
            registry.add_report(report_of(made.id, right, first=first), made.id)
    words = ("--project", "shop", "--runs", runs)
    assert posttrain("promote", "good", *words).code == 0
    said = posttrain("promote", "better", *words)
    assert "wins 20, losses 0, ties 40" in said.out  # the second of better's three reports, good's newest
