"""Runs of the recipes that are killed at random moments and gone on with, until they are done.

    python killed_runs.py FOLDER SEED

makes toy data in FOLDER, runs `pretrain`, `sft` and `grpo` once undisturbed, then again with kills, and prints JSON:
for each recipe the folder of the undisturbed run, that of the killed one, and at which step each kill came. The driver
forks its runs, so that Python and PyTorch are loaded once; each run is what `posttrain run …` does.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from posttrain.cli import main as posttrain
from posttrain.core import read_metrics
from posttrain.registry import RunFolder

KILLS = {"pretrain": 1, "sft": 2, "grpo": 4}
MADE = {"pretrain": "base", "sft": "tuned"}  # the next recipe begins with it
LETTERS = "abcdefgh"
GRADER = """
from posttrain.grade import Function

def near(trajectory):
    pairs = zip(trajectory.text, trajectory.task.answer)
    return sum(wrote == wanted for wrote, wanted in pairs) / 2 - abs(len(trajectory.text) - 2) / 10

near = Function(near)
"""


def make_world(folder: Path) -> None:
    """Text to begin with, pairs to imitate, questions to answer, and a grader in a file."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["".join(letters) for letters in itertools.product(LETTERS, repeat=2)]
    random.Random(0).shuffle(words)
    write(folder / "texts.jsonl", [{"text": f"{word}{word}"} for word in words])
    write(folder / "pairs.jsonl", [{"prompt": f"{word}>", "completion": word[::-1]} for word in words[:40]])
    write(folder / "questions.jsonl", [{"prompt": f"{word}>", "answer": word[::-1]} for word in words[40:]])
    (folder / "own.py").write_text(GRADER)


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def words_of(recipe: str, folder: Path) -> list[str]:
    """The command line of one recipe, without `posttrain`."""
    settings = {
        "pretrain": "--data texts.jsonl --vocab-size 262 --width 32 --num-layers 2 --num-heads 2 --max-length 16 "
        "--epochs 30 --batch-size 16 --held-out 8",
        "sft": "--model base --data pairs.jsonl --epochs 120 --batch-size 16 --lr 3e-3 --held-out 8 --dtype float32",
        "grpo": "--model tuned --data questions.jsonl --grader own.py:near --steps 40 --prompts-per-step 6 "
        "--group-size 4 --max-tokens 4 --lr 1e-3 --beta 0.01 --checkpoint-every 7 --seed 5",
    }
    files = ("base", "tuned", "texts.jsonl", "pairs.jsonl", "questions.jsonl", "own.py:near")
    words = [str(folder / word) if word in files else word for word in settings[recipe].split()]
    return ["run", recipe, *words, "--runs", str(folder / "runs")]


def runs_of(recipe: str, folder: Path) -> set[Path]:
    """Run folders of a recipe that say what they are; a run killed while it was created may not."""
    return {path.parent for path in (folder / "runs").glob(f"*-{recipe}-*/run.json")}


def live(words: list[str], kill_after_s: float | None) -> bool:
    """One life of a run, in a process of its own; True if it was killed."""
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as quiet:  # noqa: PTH123  a path has no descriptor to put in place of another
            os.dup2(quiet.fileno(), 1)
        try:
            code = posttrain(words)
        except BaseException:  # noqa: BLE001  whatever it is, the fork must not go on as a second driver
            sys.excepthook(*sys.exc_info())
            os._exit(99)
        os._exit(code)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"a run failed: posttrain {' '.join(words)}")
    return False


def killed(recipe: str, folder: Path, whole_s: float, rng: random.Random) -> tuple[Path, list[int]]:
    """One run, killed again and again, then let to its end; its folder, and the step at which each kill came."""
    known, run, steps = runs_of(recipe, folder), None, []
    while len(steps) < KILLS[recipe]:
        words = words_of(recipe, folder) if run is None else ["run", "--resume", str(run)]
        if not live(words, rng.uniform(0.1, 0.6) * whole_s):
            if run is not None:
                break
            # It ended before the kill came: the run that was timed had a busier machine.
            known, whole_s = runs_of(recipe, folder), whole_s * 0.7
            continue
        run = run or next(iter(runs_of(recipe, folder) - known), None)
        if run is None:
            whole_s *= 1.2  # it came before the run had a folder
        else:
            assert RunFolder.open(run, read_only=True).state.status == "interrupted"
            metrics = run / "metrics.jsonl"
            done = read_metrics(metrics) if metrics.exists() else []
            steps.append(int(done[-1]["step"]) if done else 0)
    assert run is not None
    live(["run", "--resume", str(run)], None)
    return run, steps


def main(folder: Path, seed: int) -> None:
    torch.set_num_threads(1)
    make_world(folder)
    rng = random.Random(seed)
    found: dict[str, object] = {}
    for recipe in KILLS:
        started_s = time.monotonic()
        live(words_of(recipe, folder), None)
        whole_s = time.monotonic() - started_s
        (reference,) = runs_of(recipe, folder)
        if recipe in MADE:
            shutil.copytree(reference / "model", folder / MADE[recipe])
        run, steps = killed(recipe, folder, whole_s, rng)
        found[recipe] = {"reference": str(reference), "killed": str(run), "steps": steps, "whole_s": whole_s}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
