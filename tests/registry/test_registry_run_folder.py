"""A run's folder: its files, its lock, and what survives a crash."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import pytest

from posttrain.core import Config, ConfigError, DataError, RegistryError, doc, read_metrics
from posttrain.registry import Event, RunFolder, list_runs, new_run_id

HOLD = """
import sys, time
from pathlib import Path
from posttrain.registry import RunFolder
run = RunFolder.create(Path(sys.argv[1]), "held", {}, run_id="held")
run.tracker.log({"loss": 1.0}, 1)
print("ready", flush=True)
time.sleep(60)
"""


class Small(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    lr: Annotated[float, doc("learning rate")] = 1e-5


def test_a_new_run_holds_what_was_written(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "runs", "GRPO on SQL", {"lr": 0.1, "data": Path("a.jsonl"), "seed": None})
    run.tracker.log({"reward": 0.5, "kl": float("nan")}, 1)
    run.sample({"prompt": "p", "text": "t"}, step=1)
    run.event("checkpoint", step=1, path=run.checkpoints / "1", note='two\nlines, a "quote" and x=1')
    run.finish()
    seen = RunFolder.open(run.path, read_only=True)
    assert seen.config == {"lr": 0.1, "data": "a.jsonl"}
    assert seen.state.status == "finished"
    assert seen.state.ended is not None
    assert seen.state.seconds() >= 0
    assert seen.state.code["posttrain"]
    assert read_metrics(run.path / "metrics.jsonl")[0]["reward"] == 0.5
    assert seen.samples() == [{"step": 1, "prompt": "p", "text": "t"}]
    kinds = [event.kind for event in seen.events()]
    assert kinds == ["started", "checkpoint", "finished"]
    assert seen.events()[1].fields["note"] == 'two\nlines, a "quote" and x=1'
    assert len((run.path / "events.log").read_text().splitlines()) == 3
    assert run.checkpoints.is_dir()


def test_ids_are_readable_and_sort_by_time() -> None:
    first, second = new_run_id("grpo", 1795185125.0), new_run_id("DPO, v2", 1795185126.0)
    assert first.rpartition("-")[0] == "20261120-143205-grpo"
    assert second.rpartition("-")[0] == "20261120-143206-dpo-v2"
    assert sorted([second, first]) == [first, second]


def test_the_same_settings_have_the_same_fingerprint(tmp_path: Path) -> None:
    runs = [RunFolder.create(tmp_path, "sft", config) for config in ({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 2})]
    one, same, other = [run.state.fingerprint for run in runs]
    assert one == same != other
    assert RunFolder.create(tmp_path, "sft", Small()).config == {"lr": 1e-5}


@pytest.mark.parametrize("run_id", ["", "../x", "a/b", ".hidden", "a" * 200])
def test_an_id_that_is_no_plain_name_is_refused(tmp_path: Path, run_id: str) -> None:
    with pytest.raises(RegistryError, match="run id"):
        RunFolder.create(tmp_path, "sft", {}, run_id=run_id)


def test_taken_ids_unknown_runs_and_odd_values_are_named(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, "sft", {}, run_id="one")
    with pytest.raises(RegistryError, match="exists"):
        RunFolder.create(tmp_path, "sft", {}, run_id="one")
    with pytest.raises(RegistryError, match="Runs there: one"):
        RunFolder.open(tmp_path / "two")
    with pytest.raises(ConfigError, match="object"):
        RunFolder.create(tmp_path, "sft", {"x": object()})


def test_truncating_drops_later_steps_and_the_tracker_goes_on(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "sft", {})
    held = run.tracker
    for step in range(1, 6):
        held.log({"loss": float(step)}, step)
        run.sample({"text": str(step)}, step=step)
    run.sample({"text": "no step"})
    assert run.truncate_after(3) == 4
    held.log({"loss": 40.0}, 4)
    rows = read_metrics(run.path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert [row["text"] for row in run.samples()] == ["1", "2", "3", "no step"]
    assert run.truncate_after(100) == 0
    assert run.truncate_after(0) == 7
    assert not list(run.path.glob(".*.part"))


def test_a_torn_last_line_is_cut_before_going_on(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "sft", {})
    run.tracker.log({"loss": 1.0}, 1)
    run.sample({"text": "whole"})
    run.close()
    for name in ("metrics.jsonl", "samples.jsonl", "events.log"):
        with (run.path / name).open("ab") as file:
            file.write(b'{"step": 2, "lo')
    assert len(RunFolder.open(run.path, read_only=True).samples()) == 1
    again = RunFolder.open(run.path)
    again.tracker.log({"loss": 2.0}, 2)
    assert [row["loss"] for row in read_metrics(run.path / "metrics.jsonl")] == [1.0, 2.0]
    assert [event.kind for event in again.events()] == ["started", "resumed"]
    assert again.state.resumed == 1


def test_two_writers_are_refused_and_a_killed_one_reads_as_interrupted(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        seen = RunFolder.open(tmp_path / "held", read_only=True)
        assert seen.state.status == "running"
        assert seen.state.pid == child.pid
        with pytest.raises(RegistryError, match="another process is writing it"):
            RunFolder.open(tmp_path / "held")
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert seen.state.status == "interrupted"
    with RunFolder.open(tmp_path / "held") as again:
        assert again.state.status == "running"
    assert seen.state.status == "finished"


def test_a_forked_child_that_outlives_its_parent_does_not_keep_the_lock(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "sft", {})
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    child = fork.Process(target=lambda: (ready.set(), time.sleep(30)))
    child.start()
    try:
        assert ready.wait(10)
        run.close()  # what the death of the parent does
        RunFolder.open(run.path).close()
    finally:
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()


def test_within_one_process_the_lock_holds_too(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "sft", {})
    with pytest.raises(RegistryError, match="another process"):
        RunFolder.open(run.path)


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("boom"), "failed"), (KeyboardInterrupt(), "interrupted"), (None, "finished")]
)
def test_the_context_says_how_the_run_ended(tmp_path: Path, error: BaseException | None, status: str) -> None:
    run = RunFolder.create(tmp_path, "sft", {})
    try:
        with run:
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    state = RunFolder.open(run.path, read_only=True).state
    assert state.status == status
    assert state.error == ("ValueError: boom" if status == "failed" else None)


def test_a_finished_or_read_only_run_cannot_be_written(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "sft", {})
    run.finish()
    with pytest.raises(RegistryError, match="finished or closed"):
        run.event("late")
    with pytest.raises(RegistryError, match="read-only"):
        _ = RunFolder.open(run.path, read_only=True).tracker


def test_runs_are_listed_in_order(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "none") == []
    for name in ("b", "a"):
        RunFolder.create(tmp_path, "sft", {}, run_id=name).finish("failed", error="why")
    assert [(run.id, run.state.status) for run in list_runs(tmp_path)] == [("a", "failed"), ("b", "failed")]


def test_an_event_is_read_as_it_was_written() -> None:
    event = Event(time_s=1795185125.5, kind="step", fields={"a": [1, {"b": " c=1 "}], "d": None, "e": "x\\"})
    assert Event.from_line(event.to_line().decode()) == event
    with pytest.raises(DataError, match="not a line of events"):
        Event.from_line("hello there")
    with pytest.raises(DataError, match="event kind"):
        Event(time_s=0.0, kind="two words").to_line()
