"""Checkpoints that are whole or absent, and a resume that trusts only what it has verified.

checkpoints/step-00000012/
    weights.safetensors    weights that learn, and buffers
    optimiser.safetensors  AdamW's moments
    trainer.json           step, tokens, configuration and shapes
    extra.json             what the recipe keeps; the ledger
    manifest.json          SHA-256 and size of each file above
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.core import Checkpoint, CheckpointError, Record
from posttrain.registry.durable import sync_folder
from posttrain.train.ledger import Ledger
from posttrain.train.state import TrainerState
from posttrain.train.trainer import Trainer

MANIFEST = "manifest.json"
STEP_FOLDER = re.compile(r"step-(\d{8,})\Z")


class FileDigest(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a file must be."""

    sha256: str
    num_bytes: int


class Manifest(Record, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="record", tag="manifest/1"):
    """What `manifest.json` says."""

    step: int
    files: dict[str, FileDigest]  # by path relative to the checkpoint


class Resumed(NamedTuple):
    """What `load_latest` found."""

    checkpoint: Checkpoint
    extra: dict[str, Any]


def save_checkpoint(
    folder: Path,
    trainer: Trainer,
    *,
    ledger: Ledger | None = None,
    extra: Mapping[str, Any] | None = None,
    keep: int = 2,
    export: Callable[[Path], None] | None = None,
) -> Checkpoint:
    """Write all that is needed to go on, so that a kill at any instruction leaves either all of it or none.

    Args:
        folder: of the run's checkpoints; made if absent. One process at a time may write to it.
        trainer: whose state to write.
        ledger: the prompts trained so far.
        extra: whatever else the run must remember; JSON values.
        keep: how many checkpoints to keep, this one included.
        export: called with the unfinished folder to add files of its own, for example
            `lambda path: models.save(model, path / "model", tokenizer)`; they are hashed with the rest.

    Returns:
        The checkpoint, now on disk.
    """
    if keep < 1:
        raise CheckpointError(f"keep must be at least 1, not {keep}")
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    state = trainer.state()
    final = folder / f"step-{trainer.num_steps:08d}"
    aside = folder / f".writing-{final.name}"
    aside.mkdir()
    _save_tensors(state.weights, aside / "weights.safetensors")
    _save_tensors(state.optimiser, aside / "optimiser.safetensors")
    (aside / "trainer.json").write_bytes(msgspec.json.encode(state.meta))
    kept = {"extra": dict(extra or {}), "ledger": None if ledger is None else ledger.to_dict()}
    (aside / "extra.json").write_bytes(msgspec.json.encode(kept))
    if export is not None:
        export(aside)
    digest = _write_manifest(aside, trainer.num_steps)
    if final.exists():
        final.rename(folder / f".removing-{final.name}")
    aside.rename(final)
    sync_folder(folder)
    _keep_last(folder, keep, trainer.num_steps)
    _sweep(folder)
    return Checkpoint(path=str(final), step=trainer.num_steps, digest=digest)


def load_latest(
    folder: Path,
    trainer: Trainer,
    *,
    ledger: Ledger | None = None,
    report: Callable[[str], None] | None = None,
) -> Resumed | None:
    """Go on from the newest checkpoint that verifies.

    Args:
        folder: of the run's checkpoints; may be absent.
        trainer: restored in place.
        ledger: restored in place.
        report: called with one line for each checkpoint passed over and why; None warns.

    Returns:
        The checkpoint and what the recipe kept; None if there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, but none verifies; or the newest that does belongs to another model or
            configuration (says what differs), or lacks the ledger that is asked for.
    """
    passed_over: list[str] = []
    for path in list_checkpoints(folder):
        try:
            checkpoint = verify(path)
        except CheckpointError as error:
            passed_over.append(str(error))
            _report(f"checkpoint passed over: {error}", report)
            continue
        return Resumed(checkpoint, _restore(path, trainer, ledger))
    if passed_over:
        raise CheckpointError(
            f"{folder}: none of its {len(passed_over)} checkpoints is whole. Newest: {passed_over[0]}. "
            "Move them away to begin anew"
        )
    return None


def verify(path: Path) -> Checkpoint:
    """Read a checkpoint's manifest and hash every file in it.

    Raises:
        CheckpointError: it is absent, partial or damaged; names the file.
    """
    match = STEP_FOLDER.match(path.name)
    if match is None or not path.is_dir():
        raise CheckpointError(f"{path}: not a checkpoint folder (step-00000012)")
    try:
        content = (path / MANIFEST).read_bytes()
        manifest = msgspec.json.decode(content, type=Manifest)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: {MANIFEST} is missing") from None
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise CheckpointError(f"{path}: {MANIFEST} is damaged: {error}") from error
    if manifest.step != int(match[1]):
        raise CheckpointError(f"{path}: the manifest is of step {manifest.step}")
    for name, expected in manifest.files.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        size = (path / name).stat().st_size
        if size != expected.num_bytes:
            raise CheckpointError(f"{path}: {name} has {size} bytes, not {expected.num_bytes}")
        if _sha256(path / name) != expected.sha256:
            raise CheckpointError(f"{path}: {name} is damaged: its SHA-256 is not the manifest's")
    return Checkpoint(path=str(path), step=manifest.step, digest=hashlib.sha256(content).hexdigest())


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first, whole or not."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if STEP_FOLDER.match(path.name)), key=_step_of, reverse=True)


def read_state(path: Path) -> tuple[TrainerState, dict[str, Any]]:
    """The state in a verified checkpoint, and the content of extra.json."""
    try:
        state = TrainerState(
            weights=load_file(path / "weights.safetensors"),
            optimiser=load_file(path / "optimiser.safetensors"),
            meta=msgspec.json.decode((path / "trainer.json").read_bytes()),
        )
        return state, msgspec.json.decode((path / "extra.json").read_bytes())
    except (OSError, SafetensorError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _restore(path: Path, trainer: Trainer, ledger: Ledger | None) -> dict[str, Any]:
    state, kept = read_state(path)
    if ledger is not None and kept["ledger"] is None:
        raise CheckpointError(f"{path}: it holds no ledger, so nothing says which prompts were trained")
    try:
        trainer.restore(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if ledger is not None:
        ledger.restore(kept["ledger"])
    extra: dict[str, Any] = kept["extra"]
    return extra


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _write_manifest(folder: Path, step: int) -> str:
    """Flush every file and folder to disk, then write their digests; the digest of the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {}
    for path in files:
        _sync_file(path)
        name = path.relative_to(folder).as_posix()
        digests[name] = FileDigest(sha256=_sha256(path), num_bytes=path.stat().st_size)
    content = msgspec.json.format(
        Manifest(step=step, files=digests).to_json(), indent=2
    )  # no newline: cut short by one byte, it is no JSON
    (folder / MANIFEST).write_bytes(content)
    _sync_file(folder / MANIFEST)
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
    sync_folder(folder)
    return hashlib.sha256(content).hexdigest()


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _step_of(path: Path) -> int:
    match = STEP_FOLDER.match(path.name)
    return int(match[1]) if match else -1


def _sweep(folder: Path) -> None:
    """Remove what is doomed, and what a killed process left unfinished."""
    for path in folder.iterdir():
        if path.name.startswith((".writing-", ".removing-")):
            shutil.rmtree(path)


def _keep_last(folder: Path, keep: int, step: int) -> None:
    """Doom old checkpoints. Those of later steps are not counted: they were passed over as damaged."""
    for path in [path for path in list_checkpoints(folder) if _step_of(path) <= step][keep:]:
        path.rename(folder / f".removing-{path.name}")  # at once: never half there under its own name


def _report(line: str, report: Callable[[str], None] | None) -> None:
    if report is None:
        warnings.warn(line, RuntimeWarning, stacklevel=3)
    else:
        report(line)
