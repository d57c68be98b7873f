"""The ledger of prompts that were trained: exactly once per epoch, whatever kills and resumes a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from posttrain.core import CheckpointError, TrainError


class Ledger:
    """Which prompts a step was taken on. Written when weights moved, not when answers were sampled.

    It belongs into the checkpoint beside the weights (`save_checkpoint(..., ledger=...)`), so that the two never
    disagree: a prompt in it has moved these weights, and one that is not has not.
    """

    def __init__(self) -> None:
        self._epochs: dict[int, dict[str, None]] = {}

    def record(self, ids: Iterable[str], *, epoch: int = 0) -> None:
        """Enter the prompts of one step.

        Raises:
            TrainError: one of them was already trained in this epoch; nothing is entered.
        """
        new = list(ids)
        done = self._epochs.get(epoch, {})
        twice = [prompt for prompt, count in Counter(new).items() if count > 1 or prompt in done]
        if twice:
            raise TrainError(f"{len(twice)} prompts would be trained twice in epoch {epoch}: {', '.join(twice[:5])}")
        self._epochs.setdefault(epoch, {}).update(dict.fromkeys(new))

    def pending(self, ids: Iterable[str], *, epoch: int = 0) -> list[str]:
        """Those of the prompts that this epoch has not trained yet, in the order given."""
        done = self._epochs.get(epoch, {})
        return [prompt for prompt in ids if prompt not in done]

    def trained(self, *, epoch: int = 0) -> tuple[str, ...]:
        """The prompts of an epoch, in the order in which they were trained."""
        return tuple(self._epochs.get(epoch, {}))

    def __len__(self) -> int:
        return sum(len(done) for done in self._epochs.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"epochs": {str(epoch): list(done) for epoch, done in self._epochs.items()}}

    def restore(self, values: dict[str, Any]) -> None:
        """Replace what is in it by what `to_dict` gave.

        Raises:
            CheckpointError: the values are no ledger.
        """
        try:
            self._epochs = {int(epoch): dict.fromkeys(done) for epoch, done in values["epochs"].items()}
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"not a ledger: {error!r}") from error
