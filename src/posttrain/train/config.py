"""Settings of an optimisation, and the learning rate at each step."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from posttrain.core import Config, ConfigError, doc

Schedule = Literal["constant", "linear", "cosine"]
Dtype = Literal["float32", "bfloat16"]


class TrainConfig(Config, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the trainer steps. Says nothing of what is optimised: that is the objective's."""

    lr: Annotated[float, doc("peak learning rate", ge=0)] = 1e-5
    schedule: Annotated[Schedule, doc("course of the learning rate after warm-up, down to 0 at total_steps")] = (
        "constant"
    )
    warmup: Annotated[float, doc("linear warm-up: below 1 a fraction of total_steps, else steps", ge=0)] = 0.0
    total_steps: Annotated[int, doc("optimiser steps that the schedule is laid out for; 0: unknown", ge=0)] = 0
    betas: Annotated[tuple[float, float], doc("AdamW's decay of the first and second moment")] = (0.9, 0.999)
    eps: Annotated[float, doc("AdamW's epsilon", gt=0)] = 1e-8
    weight_decay: Annotated[float, doc("decoupled decay of matrices; never of norms, biases, embeddings", ge=0)] = 0.0
    max_grad_norm: Annotated[float, doc("clip the gradient's global norm to this; 0: do not clip", ge=0)] = 1.0
    micro_tokens: Annotated[int, doc("tokens of one packed micro-batch; a longer example goes alone", ge=1)] = 8192
    dtype: Annotated[Dtype, doc("of matrix products; weights, logits, softmax and optimiser stay float32")] = "float32"
    temperature: Annotated[float, doc("logits are divided by it; that of the sampler, for policy gradients", gt=0)] = (
        1.0
    )
    entropy: Annotated[bool, doc("measure the entropy at each target (costs a little time)")] = False
    seed: Annotated[int, doc("of what is random in the model (dropout); each step derives its own")] = 0

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"train: betas must lie in [0, 1), not {self.betas}")
        needs_total = self.schedule != "constant" or 0 < self.warmup < 1
        if needs_total and self.total_steps == 0:
            raise ConfigError(f"train: schedule {self.schedule!r} with warmup {self.warmup} needs total_steps")

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up."""
        return math.ceil(self.warmup * self.total_steps) if self.warmup < 1 else int(self.warmup)

    def lr_at(self, step: int) -> float:
        """Learning rate of one step.

        Args:
            step: from 0. Warm-up rises from lr / (w + 1) at step 0 to lr at step w = warmup_steps; the decay would
                reach 0 at step total_steps, so the last step still learns. After that it stays 0.
        """
        warmup = self.warmup_steps
        if step < warmup:
            return self.lr * (step + 1) / (warmup + 1)
        if self.schedule == "constant":
            return self.lr
        done = min(1.0, (step - warmup) / max(1, self.total_steps - warmup))
        return self.lr * (1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)
