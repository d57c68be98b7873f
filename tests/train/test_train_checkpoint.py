"""Checkpoints: whole or absent, verified before they are trusted, and a resume that is exact to the bit."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from posttrain import models, train
from posttrain.core import CheckpointError, TrainError
from posttrain.train import checkpoint as checkpoint_module


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.fixture
def make_trainer(make_model):
    def make(**settings):
        settings = {"lr": 0.01, "micro_tokens": 50, **settings}
        return train.Trainer(make_model(), train.TrainConfig(**settings), train.policy_objective())

    return make


def weights(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def same_bits(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_resumed_run_goes_on_to_the_same_bits(make_trainer, make_examples, tmp_path):
    steps = [make_examples(6, seed=seed) for seed in range(5)]
    straight = make_trainer()
    rows = [straight.step(examples) for examples in steps]

    first = make_trainer()
    for examples in steps[:2]:
        first.step(examples)
    ledger = train.Ledger()
    ledger.record(["a", "b"])
    saved = train.save_checkpoint(tmp_path, first, ledger=ledger, extra={"cursor": 7, "pi": 3.141592653589793})

    second, restored = make_trainer(), train.Ledger()
    resumed = train.load_latest(tmp_path, second, ledger=restored)
    assert resumed is not None
    found, extra = resumed
    assert found == saved == train.verify(Path(saved.path))
    assert (found.step, second.num_steps, extra) == (2, 2, {"cursor": 7, "pi": 3.141592653589793})
    assert second.num_tokens == first.num_tokens
    assert restored.trained() == ("a", "b")
    for examples, row in zip(steps[2:], rows[2:], strict=True):
        metrics = second.step(examples)
        assert {**metrics, "step_s": 0, "tokens_per_second": 0} == {**row, "step_s": 0, "tokens_per_second": 0}
    assert same_bits(weights(straight), weights(second))


def test_no_checkpoint_is_none(make_trainer, tmp_path):
    assert train.load_latest(tmp_path, make_trainer()) is None
    assert train.load_latest(tmp_path / "absent", make_trainer()) is None


def test_a_checkpoint_of_step_zero_restores(make_trainer, tmp_path):
    train.save_checkpoint(tmp_path, make_trainer())
    assert train.load_latest(tmp_path, make_trainer()).checkpoint.step == 0


def test_the_last_k_are_kept(make_trainer, make_examples, tmp_path):
    trainer = make_trainer()
    for _ in range(5):
        trainer.step(make_examples(2))
        train.save_checkpoint(tmp_path, trainer, keep=3)
    assert names(tmp_path) == ["step-00000003", "step-00000004", "step-00000005"]
    with pytest.raises(CheckpointError, match="keep"):
        train.save_checkpoint(tmp_path, trainer, keep=0)


def test_saving_the_same_step_again_replaces_it(make_trainer, make_examples, tmp_path):
    trainer = make_trainer()
    trainer.step(make_examples(2))
    first = train.save_checkpoint(tmp_path, trainer, extra={"n": 1})
    second = train.save_checkpoint(tmp_path, trainer, extra={"n": 2})
    assert first.digest != second.digest
    assert train.load_latest(tmp_path, make_trainer()).extra == {"n": 2}
    assert names(tmp_path) == ["step-00000001"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped bit": (flip, "damaged"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, not|damaged"),
    "missing": (lambda path: path.unlink(), "missing"),
    "empty": (lambda path: path.write_bytes(b""), "bytes, not|damaged"),
}
FILES = ["weights.safetensors", "optimiser.safetensors", "trainer.json", "extra.json", "manifest.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_passed_over(make_trainer, make_examples, tmp_path, file, kind):
    trainer = make_trainer()
    for _ in range(2):
        trainer.step(make_examples(2))
        last = train.save_checkpoint(tmp_path, trainer, extra={"step": trainer.num_steps})
    damage, message = DAMAGE[kind]
    damage(Path(last.path) / file)
    said: list[str] = []
    try:
        resumed = train.load_latest(tmp_path, make_trainer(), report=said.append)
    except CheckpointError as error:  # a bit flipped in the manifest may leave it readable but wrong
        pytest.fail(f"not passed over: {error}")
    assert resumed is not None
    assert resumed.extra == {"step": 1}
    assert len(said) == 1
    assert "step-00000002" in said[0]
    assert file in said[0] or file == "manifest.json"
    with pytest.raises(CheckpointError, match=message if file != "manifest.json" else "step-00000002"):
        train.verify(Path(last.path))
    with pytest.warns(RuntimeWarning, match="passed over"):
        train.load_latest(tmp_path, make_trainer())


def test_nothing_whole_is_an_error_and_not_a_fresh_start(make_trainer, make_examples, tmp_path):
    trainer = make_trainer()
    trainer.step(make_examples(2))
    flip(Path(train.save_checkpoint(tmp_path, trainer).path) / "weights.safetensors")
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints is whole"):
        train.load_latest(tmp_path, make_trainer(), report=lambda line: None)


def test_after_a_damaged_newer_one_the_older_are_not_thrown_away(make_trainer, make_examples, tmp_path):
    trainer = make_trainer()
    for _ in range(3):
        trainer.step(make_examples(2))
        last = train.save_checkpoint(tmp_path, trainer, keep=2)
    flip(Path(last.path) / "weights.safetensors")
    second = make_trainer()
    train.load_latest(tmp_path, second, report=lambda line: None)
    assert second.num_steps == 2
    train.save_checkpoint(tmp_path, second, keep=1)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]
    second.step(make_examples(2))
    train.save_checkpoint(tmp_path, second, keep=1)  # takes the damaged one's place
    assert names(tmp_path) == ["step-00000003"]
    assert train.verify(tmp_path / "step-00000003").step == 3


def test_a_checkpoint_of_another_run_is_refused_and_nothing_changes(make_trainer, make_model, make_examples, tmp_path):
    trainer = make_trainer()
    trainer.step(make_examples(2))
    train.save_checkpoint(tmp_path, trainer)
    other = make_trainer(lr=0.5, betas=(0.8, 0.9))
    before = weights(other)
    with pytest.raises(
        CheckpointError, match=r"train.betas: checkpoint \[0.9, 0.999\], this run \[0.8, 0.9\].*train.lr"
    ):
        train.load_latest(tmp_path, other)
    assert same_bits(before, weights(other))
    wider = train.Trainer(make_model(mlp_width=64), trainer.config, train.policy_objective())
    with pytest.raises(CheckpointError, match=r"model.weights.layers.0.mlp.down.weight: checkpoint \[32, 48\]"):
        train.load_latest(tmp_path, wider)


def test_frozen_weights_are_checked_not_saved(make_model, make_examples, tmp_path):
    def frozen(seed):
        model = make_model(seed)
        for name, weight in model.named_parameters():
            weight.requires_grad_("mlp" in name)
        return train.Trainer(model, train.TrainConfig(), train.nll_objective)

    trainer = frozen(0)
    trainer.step(make_examples(2))
    path = Path(train.save_checkpoint(tmp_path, trainer).path)
    state, _ = train.read_state(path)
    assert state.weights.keys() == {name for name, w in trainer.model.named_parameters() if w.requires_grad}
    assert train.load_latest(tmp_path, frozen(0)) is not None
    with pytest.raises(CheckpointError, match=r"model\.frozen"):
        train.load_latest(tmp_path, frozen(1))


def test_a_missing_ledger_is_refused(make_trainer, tmp_path):
    train.save_checkpoint(tmp_path, make_trainer())
    with pytest.raises(CheckpointError, match="no ledger"):
        train.load_latest(tmp_path, make_trainer(), ledger=train.Ledger())


def test_exported_files_are_hashed_with_the_rest(make_trainer, tmp_path):
    trainer = make_trainer()
    saved = train.save_checkpoint(tmp_path, trainer, export=lambda path: models.save(trainer.model, path / "model"))
    model = models.load(Path(saved.path) / "model")
    assert same_bits(dict(model.named_parameters()), weights(trainer))
    flip(Path(saved.path) / "model" / "config.json")
    with pytest.raises(CheckpointError, match=r"model/config\.json"):
        train.verify(Path(saved.path))


def test_tied_weights_are_saved_once_and_stay_tied(make_model, make_examples, tmp_path):
    def tied():
        return train.Trainer(make_model(tie_embeddings=True), train.TrainConfig(), train.nll_objective)

    trainer = tied()
    trainer.step(make_examples(2))
    train.save_checkpoint(tmp_path, trainer)
    second = tied()
    train.load_latest(tmp_path, second)
    assert second.model.head_weight() is second.model.embed.weight
    assert trainer.step(make_examples(2))["loss"] == second.step(make_examples(2))["loss"]


def _kill_at(monkeypatch, number):
    """Die at the n-th operation on the file system; writes die half-way."""
    count = [0]

    def dying(original, half=None):
        def call(*args, **options):
            count[0] += 1
            if count[0] == number:
                if half is not None:
                    half(*args)
                raise Killed
            return original(*args, **options)

        return call

    def half_written(path, content):
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])

    def half_saved(tensors, path):
        path.write_bytes(b"\x10\x00\x00\x00")

    def half_removed(path):
        next(item for item in path.rglob("*") if item.is_file()).unlink()

    monkeypatch.setattr(checkpoint_module, "save_file", dying(checkpoint_module.save_file, half_saved))
    monkeypatch.setattr(Path, "write_bytes", dying(Path.write_bytes, half_written))
    monkeypatch.setattr(Path, "mkdir", dying(Path.mkdir))
    monkeypatch.setattr(Path, "rename", dying(Path.rename))
    monkeypatch.setattr(os, "fsync", dying(os.fsync))
    monkeypatch.setattr(shutil, "rmtree", dying(shutil.rmtree, half_removed))
    return count


def test_a_kill_at_every_operation_leaves_the_old_or_the_new(make_trainer, make_examples, tmp_path):
    trainer = make_trainer()
    folder = tmp_path / "checkpoints"
    trainer.step(make_examples(2))
    train.save_checkpoint(folder, trainer, keep=1)
    before = weights(trainer)
    trainer.step(make_examples(2))
    after = weights(trainer)
    outcomes = []
    for number in range(1, 200):
        copy = tmp_path / f"killed-{number}"
        shutil.copytree(folder, copy)
        with pytest.MonkeyPatch.context() as patch:
            count = _kill_at(patch, number)
            with contextlib.suppress(Killed):
                train.save_checkpoint(copy, trainer, keep=1)
        if count[0] < number:
            break  # the save ran through: every operation has had its turn
        second = make_trainer()
        resumed = train.load_latest(copy, second, report=lambda line: pytest.fail(line))
        assert same_bits(weights(second), before if resumed.checkpoint.step == 1 else after)
        outcomes.append(resumed.checkpoint.step)
        train.save_checkpoint(copy, trainer, keep=1)  # what was left unfinished is in nobody's way
        assert names(copy) == ["step-00000002"]
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {1, 2}
    assert len(outcomes) > 12


def test_the_ledger_refuses_a_prompt_twice():
    ledger = train.Ledger()
    ledger.record(["a", "b"], epoch=0)
    ledger.record(["a"], epoch=1)
    with pytest.raises(TrainError, match=r"twice in epoch 0: b"):
        ledger.record(["c", "b"], epoch=0)
    with pytest.raises(TrainError, match="twice"):
        ledger.record(["d", "d"], epoch=0)
    assert ledger.pending(["c", "b", "a", "d"], epoch=0) == ["c", "d"]
    assert len(ledger) == 3
    copy = train.Ledger()
    copy.restore(json.loads(json.dumps(ledger.to_dict())))
    assert (copy.trained(epoch=0), copy.trained(epoch=1)) == (("a", "b"), ("a",))
    with pytest.raises(CheckpointError, match="not a ledger"):
        copy.restore({"epochs": {"first": ["a"]}})


@pytest.mark.slow
def test_twenty_random_kills_change_nothing(tmp_path):
    script = Path(__file__).parent / "resume_run.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "runs"), "20", "11"],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["kills"] == 20
    assert len(report["resumed_at"]) >= 4, f"the kills hit too few places: {report['resumed_at']}"
    reference = report["reference"]
    assert reference["step"] == "step-00000024"
    prompts = sorted(f"prompt-{index}" for index in range(48))
    assert {epoch: sorted(done) for epoch, done in reference["ledger"]["epochs"].items()} == {
        "0": prompts,
        "1": prompts,
    }
    for killed in report["killed"]:
        assert killed == reference
