"""Data parallelism: several processes, each with its share of a step's examples, take one and the same step.

What a step is divided by, its loss, its gradient and its metrics are summed over the ranks, so that many processes do
what one would do with all the examples; they differ by rounding alone. A rank that fails stops all with its error.

Every collective call is made by every rank, in the same order, whatever its share holds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn

from posttrain.core import ConfigError, PosttrainError, TrainError
from posttrain.objectives import Metric

T = TypeVar("T")
_BUCKET = 1 << 24  # numbers that are reduced in one call (64 MiB)


class Together(Protocol):
    """Those who take a step together: `Ranks`, or `Alone`."""

    rank: int
    size: int

    def attempt(self, work: Callable[[], T]) -> T:
        """Do one's own part of something that may fail; if it fails anywhere, it fails everywhere."""
        ...

    def gather(self, value: T, kind: Any) -> list[T]:
        """Everybody's value, in the order of the ranks."""
        ...

    def metrics(self, batches: list[dict[str, Metric]]) -> list[dict[str, Metric]]:
        """Everybody's metrics."""
        ...

    def share_weights(self, model: nn.Module) -> None:
        """Begin with the weights of rank 0."""
        ...

    def sum_gradients(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Give everybody the sum of all gradients."""
        ...


class Alone:
    """One process: nothing is exchanged."""

    rank, size = 0, 1

    def attempt(self, work: Callable[[], T]) -> T:
        """See `Together`."""
        return work()

    def gather(self, value: T, kind: Any) -> list[T]:
        """See `Together`."""
        return [value]

    def metrics(self, batches: list[dict[str, Metric]]) -> list[dict[str, Metric]]:
        """See `Together`."""
        return batches

    def share_weights(self, model: nn.Module) -> None:
        """See `Together`."""

    def sum_gradients(self, weights: Mapping[str, nn.Parameter]) -> None:
        """See `Together`."""


class Ranks:
    """The processes of a `torch.distributed` group.

    `Trainer(model, config, objective, ranks=Ranks())`, then `trainer.step(ranks.share_of(examples))`. Checkpoints are
    the same on every rank: let the one with `rank == 0` write them, and all read them.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Join a group that exists; None: all processes.

        Raises:
            ConfigError: `torch.distributed` is not initialised.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise ConfigError(
                "ranks: torch.distributed is not initialised; use Ranks.from_environment() under torchrun"
            )
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        nccl = dist.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    @classmethod
    def from_environment(cls, backend: str | None = None, *, timeout_s: float = 1800.0) -> Ranks:
        """Join the processes that `torchrun` started.

        Args:
            backend: "nccl" or "gloo"; None: nccl where there is a GPU, and it is made this process's device.
            timeout_s: how long to wait for a rank that does not come.

        Raises:
            ConfigError: the process was not started by torchrun.
        """
        missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ConfigError(f"ranks: {', '.join(missing)} not set; start the processes with torchrun")
        backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        return cls()

    def share_of(self, items: Sequence[T]) -> list[T]:
        """This rank's part of a list that all ranks hold: every `size`-th item."""
        return list(items[self.rank :: self.size])

    def attempt(self, work: Callable[[], T]) -> T:
        """Do one's own part; if any rank failed, raise everywhere.

        Raises:
            TrainError: a rank failed on purpose (`PosttrainError`) or otherwise; the same message on all ranks.
        """
        result: T | None = None
        failed: str | None = None
        cause: Exception | None = None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001  the other ranks wait: they must be told, whatever it was
            cause = error
            failed = str(error) if isinstance(error, PosttrainError) else repr(error)
        failures = self.gather(failed, str | None)
        if any(failure is not None for failure in failures):
            told = [f"rank {rank}: {failure}" for rank, failure in enumerate(failures) if failure is not None]
            raise TrainError("; ".join(told)) from cause
        return result  # type: ignore[return-value]  # None only where `work` gives None

    def gather(self, value: T, kind: Any) -> list[T]:
        """Everybody's value, in the order of the ranks.

        Args:
            value: anything that `msgspec` writes as MessagePack; no pickle travels.
            kind: its type, to read it back.
        """
        content = torch.frombuffer(bytearray(msgspec.msgpack.encode(value)), dtype=torch.uint8).to(self.device)
        size = torch.tensor([len(content)], device=self.device)
        sizes = [torch.zeros_like(size) for _ in range(self.size)]
        dist.all_gather(sizes, size, group=self.group)
        lengths = [int(each) for each in sizes]
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device=self.device)
        padded[: len(content)] = content
        contents = [torch.zeros_like(padded) for _ in range(self.size)]
        dist.all_gather(contents, padded, group=self.group)
        return [
            msgspec.msgpack.decode(each[:length].cpu().numpy().tobytes(), type=kind)
            for each, length in zip(contents, lengths, strict=True)
        ]

    def metrics(self, batches: list[dict[str, Metric]]) -> list[dict[str, Metric]]:
        """The metrics of all ranks' micro-batches, for `objectives.combine`."""
        plain = [
            {name: (metric.total.item(), metric.weight.item(), metric.reduce) for name, metric in metrics.items()}
            for metrics in batches
        ]
        return [
            {
                name: Metric(torch.tensor(total).double(), torch.tensor(weight).double(), reduce)
                for name, (total, weight, reduce) in metrics.items()
            }
            for theirs in self.gather(plain, list[dict[str, tuple[float, float, Any]]])
            for metrics in theirs
        ]

    @torch.no_grad()
    def share_weights(self, model: nn.Module) -> None:
        """Copy rank 0's weights and buffers to all ranks.

        Raises:
            TrainError: the ranks hold models of different shapes.
        """
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        for rank, theirs in enumerate(self.gather(shapes, dict[str, list[int]])):
            if theirs != shapes:
                raise TrainError(f"rank {rank} holds a model of another shape than rank {self.rank}")
        first = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        for tensor in tensors.values():
            whole = tensor.data.contiguous().to(self.device)
            dist.broadcast(whole, first, group=self.group)
            tensor.data.copy_(whole)

    @torch.no_grad()
    def sum_gradients(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Replace every rank's gradients by their sum; a weight that nobody has a gradient of stays without."""
        own = [name for name, weight in weights.items() if weight.grad is not None]
        moved = {name for theirs in self.gather(own, list[str]) for name in theirs}
        for bucket in _buckets(weight for name, weight in weights.items() if name in moved):
            pieces = [weight.grad if weight.grad is not None else torch.zeros_like(weight) for weight in bucket]
            flat = torch.cat([piece.flatten() for piece in pieces]).to(self.device)
            dist.all_reduce(flat, group=self.group)
            for weight, summed in zip(bucket, torch.split(flat, [weight.numel() for weight in bucket]), strict=True):
                weight.grad = summed.view_as(weight).to(weight.device, copy=True)


def _buckets(weights: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Weights in their order, in groups that fit one call; learning weights are all float32."""
    buckets: list[list[nn.Parameter]] = []
    filled = _BUCKET
    for weight in weights:
        if filled + weight.numel() > _BUCKET:
            buckets.append([])
            filled = 0
        buckets[-1].append(weight)
        filled += weight.numel()
    return buckets


def total_of(together: Together, losses: Sequence[Tensor]) -> float:
    """The step's loss: the sum over micro-batches and ranks, the same number on every rank."""
    own = torch.stack(list(losses)).sum().item() if losses else 0.0
    return sum(together.gather(own, float))
