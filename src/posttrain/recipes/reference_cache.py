"""What the reference says: its logprob of every target, computed once and kept, or computed beside the policy.

Three ways to a reference:

    cached        the starting weights' logprobs, computed in one pass before training and kept in a file whose name is
                  the hash of weights, settings and tokens: a run that resumes, or another on the same pairs, reads it
    adapters-off  the policy without its adapters, before every step: nothing is kept, and the base is in memory anyway
    none          for methods without reference (SimPO, CPO, ORPO)

T tokens of a sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from posttrain.core import Example, UsageError
from posttrain.models import adapters_off, has_adapters
from posttrain.registry.durable import write_atomic
from posttrain.train import Trainer

REF_LOGPROBS = "ref_logprobs"

Columns = list[list[tuple[float, ...]]]  # for each example, for each of its sequences, T numbers
ReferenceMode = Literal["cached", "adapters-off", "none"]


class Reference:
    """One of the three ways, for a recipe: ask `before_training` once, and `at_step` before every step."""

    def __init__(
        self,
        mode: ReferenceMode,
        trainer: Trainer,
        folder: Path,
        *,
        fingerprint: str | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Take a trainer at the weights that training starts from; arguments as for `cached_reference`.

        Raises:
            UsageError: adapters-off without adapters.
        """
        if mode == "adapters-off" and not has_adapters(trainer.model):
            raise UsageError(
                "reference adapters-off: the model has no adapters, so without them it is the policy itself. "
                "Give a lora_rank, or take reference cached"
            )
        self.mode, self.trainer, self.folder = mode, trainer, folder
        self._fingerprint, self._report = fingerprint, report

    def before_training(self, examples: Sequence[Example]) -> list[Example]:
        """The examples, with `ref_logprobs` where they are cached."""
        if self.mode != "cached":
            return list(examples)
        return cached_reference(examples, self.trainer, self.folder, fingerprint=self._fingerprint, report=self._report)

    def at_step(self, examples: Sequence[Example]) -> list[Example]:
        """The examples, with `ref_logprobs` where they are worked out at every step."""
        return adapters_off_reference(examples, self.trainer) if self.mode == "adapters-off" else list(examples)


def model_fingerprint(model: nn.Module) -> str:
    """Hash of a model's shape and every weight; 64 hex digits. Reads each weight once."""
    digest = hashlib.sha256(repr(getattr(model, "config", None)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cached_reference(
    examples: Sequence[Example],
    trainer: Trainer,
    folder: Path,
    *,
    fingerprint: str | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> list[Example]:
    """The examples with the column `ref_logprobs`: what the trainer's model, as it is now, says of their targets.

    Call it before the first step, and before a checkpoint is restored: the reference is where training starts.

    Args:
        examples: pairs or answers.
        trainer: its forward pass, precision and temperature are those of the reference.
        folder: where the files are kept; made if absent.
        fingerprint: `model_fingerprint` of its weights, where it is known already.
        report: told in one line whether the file was read or made, or why one that is there is not used.
    """
    if not examples:
        return []
    key = _key(examples, fingerprint or model_fingerprint(trainer.model), trainer)
    path = folder / f"{key[:40]}.safetensors"
    num_targets = sum(example.num_targets() for example in examples)
    values = _read(path, key, num_targets, report)
    if values is not None:
        report(f"reference logprobs of {num_targets} tokens read from {path.name}")
        return _with_values(examples, values)
    columns = trainer.logprobs(examples)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"logprobs": torch.tensor(_target_values(examples, columns), dtype=torch.float32)}
    write_atomic(path, save(tensors, metadata={"key": key, "fingerprint": fingerprint or ""}))
    report(f"reference logprobs of {num_targets} tokens computed, kept in {path.name}")
    return with_reference(examples, columns)


def adapters_off_reference(examples: Sequence[Example], trainer: Trainer) -> list[Example]:
    """The examples with the column `ref_logprobs`: what the trainer's model says without its adapters."""
    with adapters_off(trainer.model):
        return with_reference(examples, trainer.logprobs(examples))


def with_reference(examples: Sequence[Example], columns: Columns, name: str = REF_LOGPROBS) -> list[Example]:
    """The examples with one more column, as `Trainer.logprobs` gives it."""
    return [
        example.replace(
            sequences=tuple(
                sequence.replace(columns={**sequence.columns, name: column_T})
                for sequence, column_T in zip(example.sequences, own, strict=True)
            )
        )
        for example, own in zip(examples, columns, strict=True)
    ]


def _key(examples: Sequence[Example], fingerprint: str, trainer: Trainer) -> str:
    config = trainer.config
    digest = hashlib.sha256(f"{fingerprint} {config.dtype} {config.temperature}\n".encode())
    for example in examples:
        for sequence in example.sequences:
            digest.update(np.asarray([len(sequence.tokens), *sequence.tokens], dtype=np.int64).tobytes())
            digest.update(np.asarray(sequence.mask, dtype=np.bool_).tobytes())
    return digest.hexdigest()


def _read(path: Path, key: str, num_targets: int, report: Callable[[str], None]) -> torch.Tensor | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            values: torch.Tensor = file.get_tensor("logprobs")
            metadata: dict[str, Any] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        report(f"{path.name} is damaged and made anew: {error}")
        return None
    if metadata.get("key") != key or values.shape != (num_targets,) or not bool(values.isfinite().all()):
        report(f"{path.name} does not hold what its name says and is made anew")
        return None
    return values


def _with_values(examples: Sequence[Example], values: torch.Tensor) -> list[Example]:
    left = iter(values.double().tolist())
    columns = [
        [tuple(next(left) if is_target else 0.0 for is_target in sequence.mask) for sequence in example.sequences]
        for example in examples
    ]
    return with_reference(examples, columns)


def _target_values(examples: Sequence[Example], columns: Columns) -> list[float]:
    return [
        value
        for example, own in zip(examples, columns, strict=True)
        for sequence, column_T in zip(example.sequences, own, strict=True)
        for value, is_target in zip(column_T, sequence.mask, strict=True)
        if is_target
    ]
