"""A small real training run that can be killed and started again, and a driver that does so many times.

    python resume_run.py FOLDER NUM_KILLS SEED

prints JSON: what an uninterrupted run left, what each killed run left, and how often it was killed. The driver forks
its runs, so that Python and PyTorch are loaded once.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

from posttrain import models, train
from posttrain.core import Example, TokenSequence, generator
from posttrain.registry import RunFolder

NUM_STEPS, PER_STEP, NUM_EPOCHS = 24, 4, 2
PROMPTS = [f"prompt-{index}" for index in range(NUM_STEPS * PER_STEP // NUM_EPOCHS)]


def example_of(prompt: str, epoch: int) -> Example:
    rng = generator(7, prompt, epoch)
    length = rng.randint(6, 20)
    return Example(
        id=prompt,
        sequences=(
            TokenSequence(
                tokens=tuple(rng.randrange(32) for _ in range(length)),
                mask=(False, False) + (True,) * (length - 2),
                columns={"advantages": tuple(rng.gauss(0, 1) for _ in range(length))},
            ),
        ),
    )


def make_trainer() -> train.Trainer:
    """The same model and settings every time."""
    shape = models.DecoderConfig(
        vocab_size=32, width=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32, max_positions=32
    )
    config = train.TrainConfig(lr=0.01, schedule="cosine", warmup=3, total_steps=NUM_STEPS, micro_tokens=32)
    return train.Trainer(models.Decoder.random(shape, seed=1), config, train.policy_objective())


def run(path: Path) -> None:
    """Begin or go on, to the end. The run's folder exists."""
    folder = RunFolder.open(path)
    trainer = make_trainer()
    ledger = train.Ledger()
    train.load_latest(folder.checkpoints, trainer, ledger=ledger)
    folder.truncate_after(trainer.num_steps)
    while trainer.num_steps < NUM_STEPS:
        epoch = trainer.num_steps * PER_STEP // len(PROMPTS)
        order = generator(3, "order", epoch).sample(PROMPTS, len(PROMPTS))
        prompts = ledger.pending(order, epoch=epoch)[:PER_STEP]
        metrics = trainer.step([example_of(prompt, epoch) for prompt in prompts])
        ledger.record(prompts, epoch=epoch)
        steady = {name: value for name, value in metrics.items() if name not in train.TIMING_METRICS}
        folder.tracker.log(steady, trainer.num_steps)
        if trainer.num_steps % 2 == 0 or trainer.num_steps == NUM_STEPS:
            train.save_checkpoint(folder.checkpoints, trainer, ledger=ledger)
    folder.finish()


def begin(path: Path) -> Path:
    """Make a run's folder."""
    RunFolder.create(path.parent, "tiny", {}, run_id=path.name).close()
    return path


def left_behind(path: Path) -> dict[str, object]:
    """Hashes of the last checkpoint's tensors and of the metrics, and what the ledger says."""
    newest = train.list_checkpoints(path / "checkpoints")[0]
    train.verify(newest)
    _, kept = train.read_state(newest)
    files = [newest / "weights.safetensors", newest / "optimiser.safetensors", path / "metrics.jsonl"]
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return {
        **hashes,
        "ledger": kept["ledger"],
        "step": newest.name,
        "left": sorted(item.name for item in (path / "checkpoints").iterdir()),
    }


def live(path: Path, kill_after_s: float | None) -> bool:
    """One life of a run, in a process of its own; True if it was killed."""
    child = os.fork()
    if child == 0:
        try:
            run(path)
        except BaseException:  # noqa: BLE001  whatever it is, the fork must not go on as a second driver
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"a run failed in {path}")
    return False


def main(folder: Path, num_kills: int, seed: int) -> None:
    warnings.simplefilter("error")  # no checkpoint may ever be passed over: kills leave none damaged
    torch.set_num_threads(1)
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    make_trainer()  # loads what PyTorch loads late, so that the forks need not
    started_s = time.monotonic()
    live(begin(folder / "reference"), None)
    whole_s = time.monotonic() - started_s
    results, kills, resumed_at = [], 0, set()
    while kills < num_kills:
        path = begin(folder / f"killed-{len(results)}")
        for _ in range(10):
            if kills == num_kills or not live(path, rng.uniform(0.02, 0.3) * whole_s):
                break
            kills += 1
            resumed_at.update(item.name for item in train.list_checkpoints(path / "checkpoints")[:1])
        live(path, None)
        results.append(left_behind(path))
    report = {"reference": left_behind(folder / "reference"), "killed": results, "kills": kills}
    print(json.dumps({**report, "resumed_at": sorted(resumed_at), "whole_s": whole_s}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
