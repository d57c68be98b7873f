"""The trainer: packs examples, adds up gradients, clips, steps. It does not know what it optimises.

N tokens of a micro-batch, P target positions among them, D width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from posttrain import objectives
from posttrain.core import Example, TrainError, derive_seed
from posttrain.models import Decoder, ScoredDecoder, SharedRow, shares_prefixes
from posttrain.objectives import Metric
from posttrain.train.batch import Batch, StepCounts, build_batch
from posttrain.train.config import TrainConfig
from posttrain.train.forward import Forward, Pass, token_forward
from posttrain.train.losses import Objective, nll_objective
from posttrain.train.optimiser import AdamW, trainable
from posttrain.train.prefixes import Micro, layout_of, micros_of
from posttrain.train.ranks import Alone, Together, total_of
from posttrain.train.rows import ExampleRow, to_rows
from posttrain.train.state import TrainerState, check_identity, model_identity, weights_of

TIMING_METRICS = frozenset({"tokens_per_second", "step_s"})
"""Metrics of `Trainer.step` that the clock decides; all others are reproducible bit for bit on a CPU."""


def _padded(tokens_N: Tensor, lengths: Sequence[int], max_positions: int) -> tuple[Tensor, Sequence[int]]:
    """The row with a few more sequences, of no consequence, that fill it up to one of few lengths (about 3 % more).

    oneDNN compiles and keeps a matrix product for every shape. With each row of a length of its own, a run spends
    milliseconds of each step on that, and grows by megabytes.
    """
    multiple = max(128, 1 << max(0, len(tokens_N).bit_length() - 5))
    missing = -len(tokens_N) % multiple
    if not missing:
        return tokens_N, lengths
    whole, rest = divmod(missing, piece := min(32, max_positions))
    fillers = [piece] * whole + [rest] * (rest > 0)
    return torch.nn.functional.pad(tokens_N, (0, missing)), [*lengths, *fillers]


class _Planned(NamedTuple):
    """A micro-batch, which examples it is of, and what they share (None: the model computes every token)."""

    batch: Batch
    micro: Micro
    shared: SharedRow | None


class Trainer:
    """One model, one optimiser, one objective.

    The weights that learn become float32 in place (with dtype float32 the frozen ones too); with dtype bfloat16 matrix
    products run under autocast. A sampler that shares the model sees every step at once.
    """

    def __init__(
        self,
        model: Decoder | ScoredDecoder,
        config: TrainConfig,
        objective: Objective,
        *,
        forward: Forward = token_forward,
        device: torch.device | str | None = None,
        ranks: Together | None = None,
    ) -> None:
        """Take a model over.

        Args:
            model: trained in place; parameters with requires_grad False stay as they are.
            config: how to step.
            objective: from a micro-batch to its share of the loss.
            forward: from the model to what the objective takes; the default gives the targets' logprobs.
            device: where to move the model; None leaves it where it is.
            ranks: the processes that take every step together, each with its share of the examples; all begin with the
                weights of the first. None: this one is alone.

        Raises:
            TrainError: no parameter of the model learns, or the ranks hold different models.
        """
        if device is not None:
            model.to(device)
        for weight in model.parameters():
            if weight.requires_grad or config.dtype == "float32":
                weight.data = weight.data.float()
        self.model = model
        self.config = config
        self.objective = objective
        self.forward = forward
        self.num_steps = 0
        self.num_tokens = 0  # trained on since the beginning, prompts included
        self._weights = trainable(model)
        if not self._weights:
            raise TrainError("no parameter of the model learns: all have requires_grad False")
        self.device = next(iter(self._weights.values())).device
        self._optimiser = AdamW(model, config)
        self._ranks: Together = ranks or Alone()
        self._ranks.share_weights(model)
        self._identity: dict[str, Any] | None = None

    def step(self, examples: Sequence[Example]) -> dict[str, float]:
        """One optimiser step over all the examples, in as many micro-batches as they need.

        Examples without a target are counted (`num_empty_examples`) and otherwise ignored. With `ranks`, all of them
        step at the same time, a rank without any example too; what is returned or raised is of all examples, and the
        same on every rank but for the `TIMING_METRICS`.

        Returns:
            The objective's metrics, and `loss`, `lr`, `grad_norm` (before clipping), `num_tokens` (since the
            beginning), `num_targets`, `num_examples`, `num_empty_examples`, `num_micro_batches`, and the
            `TIMING_METRICS`.

        Raises:
            TrainError: an example is malformed; none has a target; the loss or gradient is not finite (the message
                names the step and the examples). The weights are as before.
        """
        started_s = time.perf_counter()
        rows = self._ranks.attempt(lambda: self._rows(examples))
        live = [row for row in rows if row.num_targets]
        counts = self._counts(rows)
        if not counts.denominators.examples:
            raise TrainError(
                f"step {self.num_steps + 1}: none of its {counts.num_examples} examples has a target token. "
                "Their masks are all False: did every rollout fail, or does the chat template mark no assistant turn?"
            )
        losses, metrics = self._ranks.attempt(lambda: self._gradients(self._plan(live, counts)))
        self._ranks.sum_gradients(self._weights)
        norm = torch.nn.utils.get_total_norm(self._optimiser.gradients())
        total = total_of(self._ranks, losses)
        grad_norm = norm.item()
        if not (math.isfinite(total) and math.isfinite(grad_norm)):
            raise self._not_finite(total, grad_norm, live, counts)
        lr = self._update(norm)
        self.num_steps += 1
        self.num_tokens += counts.num_tokens
        seconds = time.perf_counter() - started_s
        return {
            "loss": total,
            "lr": lr,
            "grad_norm": grad_norm,
            **objectives.combine(self._ranks.metrics(metrics)),
            "num_tokens": float(self.num_tokens),
            "num_targets": float(counts.denominators.tokens),
            "num_examples": float(counts.num_examples),
            "num_empty_examples": float(counts.num_examples - counts.denominators.examples),
            "num_micro_batches": float(sum(self._ranks.gather(len(losses), int))),
            "step_s": seconds,
            "tokens_per_second": counts.num_tokens / seconds,
        }

    def logprobs(self, examples: Sequence[Example]) -> list[list[tuple[float, ...]]]:
        """Log-probability of every target under the weights as they are: for `old_logprobs` and `ref_logprobs`.

        With another forward pass, what that gives for every target: values, scores.

        The forward pass is that of `step`: the same packing, precision and temperature, so that on the first step
        after it every ratio is exactly 1 if the same examples are given.

        Returns:
            For each example, for each of its sequences, T values: 0 where the token is no target.
        """
        rows = self._rows(examples)
        columns = [[np.zeros(len(sequence.tokens_T)) for sequence in row.sequences] for row in rows]
        live = [index for index, row in enumerate(rows) if row.num_targets]
        self.model.eval()
        for planned in self._plan([rows[index] for index in live], StepCounts.of(rows)):
            with self._same_kernels_without_graph():
                stats = self._stats(planned, self.config.temperature, entropy=False)
            values_P = stats[0].double().cpu().numpy()
            at = 0
            for member in planned.micro.members:
                index = live[member]
                for column_T, sequence in zip(columns[index], rows[index].sequences, strict=True):
                    column_T[sequence.targets] = values_P[at : at + len(sequence.targets)]
                    at += len(sequence.targets)
        return [[tuple(column_T.tolist()) for column_T in sequences] for sequences in columns]

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Example]) -> dict[str, float]:
        """How well the model predicts the targets, at temperature 1; nothing is learned. With `ranks`, of all their
        examples.

        Returns:
            `nll` (mean over target tokens, nats), `perplexity`, `entropy` (mean over target tokens, nats),
            `num_targets`, `num_examples`.

        Raises:
            TrainError: an example is malformed, or none has a target.
        """
        rows = self._ranks.attempt(lambda: self._rows(examples))
        live = [row for row in rows if row.num_targets]
        counts = self._counts(rows)
        if not counts.denominators.examples:
            raise TrainError(f"evaluate: none of the {counts.num_examples} examples has a target token")
        self.model.eval()
        metrics = []
        for planned in self._plan(live, counts):
            stats = self._stats(planned, 1.0, entropy=True)
            metrics.append(nll_objective(stats, planned.batch)[1])
        result = objectives.combine(self._ranks.metrics(metrics))
        return {
            **result,
            "perplexity": math.exp(min(result["nll"], 700.0)),
            "num_targets": float(counts.denominators.tokens),
            "num_examples": float(counts.num_examples),
        }

    def state(self) -> TrainerState:
        """What a checkpoint must hold. The tensors are the trainer's own: write or clone them before the next step."""
        meta = {"num_steps": self.num_steps, "num_tokens": self.num_tokens, "identity": self.identity}
        return TrainerState(weights_of(self.model), self._optimiser.state(), meta)

    def restore(self, state: TrainerState) -> None:
        """Go on from a state.

        Raises:
            CheckpointError: it belongs to another model or configuration; says what differs. Nothing is changed.
        """
        check_identity(state.meta["identity"], self.identity)
        self._optimiser.restore(state.optimiser)
        with torch.no_grad():
            for name, tensor in weights_of(self.model).items():
                tensor.copy_(state.weights[name])
        self.num_steps = int(state.meta["num_steps"])
        self.num_tokens = int(state.meta["num_tokens"])

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with this run: configuration, weights' shapes, frozen weights."""
        if self._identity is None:
            self._identity = {"train": self.config.to_dict(), "model": model_identity(self.model)}
        return self._identity

    def _rows(self, examples: Sequence[Example]) -> list[ExampleRow]:
        shape = self.model.config
        return to_rows(examples, vocab_size=shape.vocab_size, max_positions=shape.max_positions)

    def _counts(self, rows: Sequence[ExampleRow]) -> StepCounts:
        return StepCounts.over(self._ranks.gather(StepCounts.of(rows), StepCounts), self._ranks.rank)

    def _plan(self, live: Sequence[ExampleRow], counts: StepCounts) -> Iterator[_Planned]:
        decoder = self.model.decoder if isinstance(self.model, ScoredDecoder) else self.model
        product = torch.bfloat16 if self.config.dtype == "bfloat16" else torch.float32
        shared = shares_prefixes(decoder, self.device, product)
        for micro in micros_of(live, self.config.micro_tokens, shared=shared):
            rows = [live[index] for index in micro.members]
            batch = build_batch(rows, counts.denominators, counts.groups, self.device)
            yield _Planned(batch, micro, layout_of(micro, live) if shared else None)

    def _gradients(self, batches: Iterator[_Planned]) -> tuple[list[Tensor], list[dict[str, Metric]]]:
        """Add up the gradients of all micro-batches; their losses and metrics."""
        self.model.train()
        self._optimiser.zero_grad()
        losses, metrics = [], []
        for index, planned in enumerate(batches):
            with self._derived_randomness(index):
                stats = self._stats(planned, self.config.temperature, self.config.entropy)
                loss, observed = self.objective(stats, planned.batch)
                loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            metrics.append(observed)
        return losses, metrics

    def _update(self, norm: Tensor) -> float:
        lr = self.config.lr_at(self.num_steps)
        if self.config.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(self._weights.values(), self.config.max_grad_norm, norm)
        self._optimiser.step(lr)
        self._optimiser.zero_grad()
        return lr

    def _stats(self, planned: _Planned, temperature: float, entropy: bool) -> Any:
        batch = planned.batch
        row = Pass(batch.tokens_N, batch.lengths, temperature, entropy, planned.shared)
        if planned.shared is None:
            tokens_N, lengths = _padded(batch.tokens_N, batch.lengths, self.model.config.max_positions)
            row = row._replace(tokens_N=tokens_N, lengths=lengths)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            return self.forward(self.model, batch, row)

    @contextmanager
    def _derived_randomness(self, micro_batch: int) -> Iterator[None]:
        """What is random in the model depends on seed, step and micro-batch alone: nothing to save, nothing to lose."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            other = ("rank", self._ranks.rank) if self._ranks.rank else ()  # ranks draw apart from each other
            torch.manual_seed(derive_seed(self.config.seed, "train", self.num_steps, micro_batch, *other))
            yield

    @contextmanager
    def _same_kernels_without_graph(self) -> Iterator[None]:
        """Gradients enabled, but nothing that needs one. Under no_grad a model may take other kernels (the norms do,
        on a CPU), whose last bit becomes a visible ratio once it is rounded to bfloat16."""
        for weight in self._weights.values():
            weight.requires_grad_(False)
        try:
            with torch.enable_grad():
                yield
        finally:
            for weight in self._weights.values():
                weight.requires_grad_(True)

    def _not_finite(self, total: float, grad_norm: float, live: Sequence[ExampleRow], counts: StepCounts) -> TrainError:
        """Find the examples that are to blame, one by one; slow, but the run is over."""
        mine = []
        for row in live:
            losses, _ = self._gradients(self._plan([row], counts))
            norm = torch.nn.utils.get_total_norm(self._optimiser.gradients())
            if not (math.isfinite(losses[0].item()) and math.isfinite(norm.item())):
                mine.append(row.id)
        self._optimiser.zero_grad()
        guilty = [name for names in self._ranks.gather(mine, list[str]) for name in names]
        all_names = [name for names in self._ranks.gather([row.id for row in live], list[str]) for name in names]
        names = guilty or all_names
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        blame = "caused by" if guilty else "by no example alone; the step had"
        return TrainError(
            f"step {self.num_steps + 1}: loss {total}, gradient norm {grad_norm}; {blame} examples "
            f"{', '.join(names[:8])}{more}. The weights are as before this step. Look at these examples, "
            "or lower the learning rate"
        )
