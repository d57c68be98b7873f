"""Every error that posttrain raises on purpose.

    PosttrainError
    ├── UsageError            the caller asked for something that cannot be (exit code 2)
    │   ├── ConfigError       a configuration value or key is wrong
    │   └── MissingExtraError an optional dependency is not installed
    ├── DataError             a file or a row is not what it should be
    ├── RenderError           a chat template or tokenizer cannot do what is asked of it
    ├── ModelError            a model folder, a weight or a shape is wrong
    ├── EngineError           the sampler refuses or lost a request
    ├── RolloutError          too many rollouts failed
    ├── GradeError            a grader is wrong about its own cases, or too many grades failed
    ├── TrainError            an optimisation step cannot go on (NaN, empty batch)
    │   └── CheckpointError   a checkpoint is damaged, partial or of another run
    ├── EvaluateError         an evaluation or a comparison cannot be made
    ├── RegistryError         an artifact, run or promotion is not in the store or not allowed
    │   └── GateRefused       a promotion gate said no; the champion stays
    └── ServeError            an endpoint or the feedback store refuses a request

A message says what was wrong, where, and what to do about it. Failures that belong to the nature of the work (a
rollout that times out, a grader that crashes) are data (`StopReason.ERROR`, `Grade.error`), not exceptions.
"""

from __future__ import annotations


class PosttrainError(Exception):
    """Base of all errors raised on purpose. `str(error)` is fit to be shown to a user."""


class UsageError(PosttrainError):
    """The caller asked for something that cannot be."""


class ConfigError(UsageError):
    """A configuration key is unknown or its value is of the wrong type or out of range."""


class MissingExtraError(UsageError):
    """An optional dependency is needed and is not installed."""

    def __init__(self, package: str, extra: str, what_for: str) -> None:
        super().__init__(
            f"{what_for} needs the package {package!r}, which is not installed: pip install 'posttrain[{extra}]'"
        )


class DataError(PosttrainError):
    """A file or row is not what it should be; says file, line and field."""


class RenderError(PosttrainError):
    """A chat template or tokenizer cannot do what is asked of it."""


class ModelError(PosttrainError):
    """A model folder, a weight's name or a shape is wrong."""


class EngineError(PosttrainError):
    """The sampler refuses a request (for example one larger than its cache)."""


class RolloutError(PosttrainError):
    """Too many rollouts failed; carries the most frequent causes."""


class GradeError(PosttrainError):
    """A grader fails its own proof, or too many grades failed."""


class TrainError(PosttrainError):
    """An optimisation step cannot go on."""


class CheckpointError(TrainError):
    """A checkpoint is damaged, partial, or belongs to another run."""


class EvaluateError(PosttrainError):
    """An evaluation or a comparison cannot be made from what was given."""


class RegistryError(PosttrainError):
    """An artifact, run or promotion is unknown or not allowed."""


class GateRefused(RegistryError):
    """A promotion gate said no. The champion stays in place."""


class ServeError(PosttrainError):
    """An endpoint or the feedback store refuses a request."""
