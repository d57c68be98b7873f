"""A run killed at any moment goes on and ends with the same weights, bit for bit, and each prompt once per epoch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from posttrain.core import read_metrics
from posttrain.registry import RunFolder
from posttrain.train import TIMING_METRICS, Ledger, list_checkpoints, read_state, verify

SCRIPT = Path(__file__).with_name("killed_runs.py")
BY_THE_CLOCK = {*TIMING_METRICS, "rollout/seconds", "grade/seconds"}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder, and by recipe an undisturbed run and one that was killed several times."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), "0"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def steady_metrics(run: Path) -> list[dict[str, float]]:
    """Without what the clock decides."""
    rows = read_metrics(run / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in BY_THE_CLOCK} for row in rows]


def assert_same(run: Path, reference: Path) -> None:
    """Weights, tokenizer and configuration of the model; the last checkpoint's tensors; metrics; status."""
    for name in sorted(path.name for path in (reference / "model").iterdir()):
        assert digest(run / "model" / name) == digest(reference / "model" / name), name
    checkpoints = [list_checkpoints(each / "checkpoints")[0] for each in (run, reference)]
    assert len({verify(each).digest for each in checkpoints}) == 1
    rows = steady_metrics(run)
    assert rows == steady_metrics(reference)
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows}), "each step is logged once"
    assert RunFolder.open(run, read_only=True).state.status == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["pretrain", "sft", "grpo"])
def test_killed_and_undisturbed_runs_end_alike(world: tuple[Path, dict[str, Any]], recipe: str) -> None:
    found = world[1][recipe]
    run, reference = Path(found["killed"]), Path(found["reference"])
    assert found["steps"], "no kill came before the end: nothing was tried"
    state = RunFolder.open(run, read_only=True).state
    assert state.resumed >= len(found["steps"])
    assert_same(run, reference)
    rows = steady_metrics(run)
    if recipe != "grpo":
        assert rows[-1]["eval/nll"] < rows[0]["eval/nll"] - 1  # it is a run in which something is learned
    else:
        assert sum(row["reward"] for row in rows[-10:]) > sum(row["reward"] for row in rows[:10])
        samples = [[json.loads(line)["step"] for line in open(each / "samples.jsonl")] for each in (run, reference)]  # noqa: SIM115, PTH123
        assert samples[0] == samples[1]


@pytest.mark.slow
def test_the_ledger_has_each_prompt_once_per_epoch(world: tuple[Path, dict[str, Any]]) -> None:
    run = Path(world[1]["grpo"]["killed"])
    _, kept = read_state(list_checkpoints(run / "checkpoints")[0])
    ledger = Ledger()
    ledger.restore(kept["ledger"])
    epochs = sorted(int(epoch) for epoch in kept["ledger"]["epochs"])
    assert len(epochs) == 10  # 40 steps, 4 of which see all 24 questions
    for epoch in epochs:
        trained = ledger.trained(epoch=epoch)
        assert len(trained) == len(set(trained)) == 24
    assert ledger.trained(epoch=0) != ledger.trained(epoch=1), "each epoch has an order of its own"


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_and_going_on_ends_alike(world: tuple[Path, dict[str, Any]]) -> None:
    folder, found = world
    driver = _load(SCRIPT)
    command = [str(Path(sys.executable).with_name("posttrain"))]
    for _ in range(4):  # on a busy machine a run of seconds may end before the signal is sent
        before = driver.runs_of("grpo", folder)
        child = subprocess.Popen(
            [*command, *driver.words_of("grpo", folder)],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_heed_interrupts,
        )
        run = _wait_for_steps(child, lambda known=before: driver.runs_of("grpo", folder) - known, steps=5)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
        if child.returncode != 0:
            break
    assert child.returncode == 130, errors
    assert f"interrupted; go on with: posttrain run --resume {run}" in errors
    assert "Traceback" not in errors
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    assert 0 < read_metrics(run / "metrics.jsonl")[-1]["step"] < 40, "the interrupt came too late"

    again = subprocess.run(
        [*command, "run", "--resume", str(run)], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0, again.stderr
    assert_same(run, Path(found["grpo"]["reference"]))


def _heed_interrupts() -> None:
    """As in a terminal: what a shell starts in the background, these tests perhaps, inherits that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait_for_steps(child: subprocess.Popen[str], new_runs: Any, *, steps: int) -> Path:
    """The new run's folder, once its metrics have so many lines."""
    give_up = time.monotonic() + 90
    while time.monotonic() < give_up and child.poll() is None:
        for run in new_runs():
            metrics = run / "metrics.jsonl"
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= steps:
                return Path(run)
        time.sleep(0.02)
    child.kill()
    raise AssertionError(f"no {steps} steps within 90 s: {child.communicate()}")


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
