"""The grader of repetition: how much of an answer says again what it has said.

Sources: n-gram repetition penalty, Yeo et al., 2025 (arXiv 2502.03373, appendix); the length of repeated suffixes as in
the DRY sampler (p-e-w, text-generation-webui #5677, 2024), here over whole answers.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np

from posttrain.core import ConfigError, Grade, GradeCase, Task, Trajectory
from posttrain.grade.answer import answer_text

RepetitionUnit = Literal["words", "tokens"]


def repeated_ngrams(items: Sequence[Hashable], n: int) -> float:
    """The share of n-grams that came before: 1 − distinct / all; 0 where there are fewer than two."""
    grams = [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def longest_loop(items: Sequence[Hashable], max_period: int = 100) -> int:
    """The most items in a row that repeat what stood the same distance before: how long a text went round in circles.

    "a b c a b c a b c" loops for 6 items (period 3); a text without loops gives 0 or little.

    Args:
        items: words or token ids.
        max_period: longest period that is looked for.
    """
    known: dict[Hashable, int] = {}
    ids = np.array([known.setdefault(item, len(known)) for item in items])
    longest = 0
    for period in range(1, min(max_period, len(ids) - 1) + 1):
        # Runs of places that say what was said a period before: the gaps between places that do not.
        breaks = np.flatnonzero(ids[period:] != ids[:-period])
        run = int(np.diff(breaks, prepend=-1, append=len(ids) - period).max()) - 1
        if run >= period:  # at least one whole repetition
            longest = max(longest, run)
    return longest


class Repetition:
    """1 for an answer that does not repeat itself, falling to 0 as more of its n-grams came before.

    The score is 1 up to `free`, and falls linearly to 0 where all is repeated. An answer that loops for more than
    `max_loop` items scores 0.

    Parts: `repeated`, the share of n-grams that came before; `loop`, the items of the longest loop.

    Args:
        n: items of an n-gram.
        free: share of repeated n-grams that costs nothing; ordinary prose repeats a little.
        max_loop: longest loop that is let pass; None lets all pass.
        unit: words of the answer, or the tokens that the policy wrote.
        name: the grader's name.
    """

    def __init__(
        self,
        n: int = 4,
        *,
        free: float = 0.1,
        max_loop: int | None = 40,
        unit: RepetitionUnit = "words",
        name: str = "repetition",
    ) -> None:
        if n < 1 or not 0 <= free < 1 or (max_loop is not None and max_loop < 1) or unit not in ("words", "tokens"):
            raise ConfigError(
                f"grader {name!r}: n and max_loop must be at least 1, free at least 0 and below 1, unit words or "
                f"tokens, not {n}, {max_loop}, {free}, {unit!r}"
            )
        self.name = name
        self._n = n
        self._free = free
        self._max_loop = max_loop
        self._unit = unit

    async def grade(self, trajectory: Trajectory) -> Grade:
        """Count."""
        started_s = time.perf_counter()
        items: list[Hashable] = (
            [token for token, own in zip(trajectory.tokens, trajectory.mask, strict=True) if own]
            if self._unit == "tokens"
            else list(answer_text(trajectory).casefold().split())
        )
        repeated = repeated_ngrams(items, self._n)
        loop = longest_loop(items[-2000:])
        score = min(1.0, (1 - repeated) / (1 - self._free))
        looped = self._max_loop is not None and loop > self._max_loop
        return Grade(
            score=0.0 if looped else score,
            grader=self.name,
            parts={"repeated": repeated, "loop": float(loop)},
            rationale=f"{repeated:.0%} of its {self._n}-grams came before, loops for {loop}",
            seconds=time.perf_counter() - started_s,
        )

    def cases(self) -> Sequence[GradeCase]:
        """A text that says nothing twice, and texts that do; cases in words, as there is no tokenizer."""
        task = Task(id="write", prompt="Write.")
        if self._unit == "tokens":
            return ()
        plain = " ".join(f"w{number}" for number in range(60))
        circles = " ".join(["round and round it goes"] * 24)
        low = 0.1 if self._max_loop is None or self._max_loop > 110 else 0.0
        say_again = f"{plain} {plain}"
        halves = 1 - repeated_ngrams(say_again.split(), self._n)
        expected = 0.0 if self._max_loop is not None and self._max_loop < 60 else min(1.0, halves / (1 - self._free))
        return (
            GradeCase(task=task, text=plain, low=1, high=1, why="nothing comes twice"),
            GradeCase(task=task, text=circles, low=0, high=low, why="goes round in circles"),
            GradeCase(
                task=task, text=say_again, low=expected - 1e-9, high=min(expected + 1e-9, 0.999), why="said twice"
            ),
        )
