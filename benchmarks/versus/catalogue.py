"""What is measured: every workload, its size, and the bar that it must clear.

A workload is plain data, so that it travels to the workers as JSON. Needs the standard library alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Kind = Literal["sampling", "turns", "first_token", "grpo", "sft", "dpo"]
Measure = Literal["speed", "memory", "share"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One line of the table.

    `measure`: "speed" compares seconds for equal work (ratio = theirs / ours, more is better); "memory" compares peak
    resident memory (ratio = ours / theirs, less is better); "share" is our useful operations per second over the
    machine's bf16 peak (more is better).
    """

    name: str
    kind: Kind
    shape: str
    unit: str
    sizes: dict[str, Any] = field(default_factory=dict)
    measure: Measure = "speed"
    bar: float | None = None
    aim: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    @property
    def lower_is_better(self) -> bool:
        """Whether the bar is an upper bound."""
        return self.measure == "memory"

    def holds(self, value: float) -> bool | None:
        """Whether a value clears the bar; None where there is none."""
        if self.bar is None:
            return None
        return value <= self.bar if self.lower_is_better else value >= self.bar


def catalogue() -> tuple[Workload, ...]:
    """All workloads of `make bench`."""
    return (*_sampling(), *_grpo(), *_training(), *_others())


def tiny_catalogue() -> tuple[Workload, ...]:
    """The same kinds in a size that takes seconds, to prove the harness; their figures mean nothing."""
    small: dict[str, dict[str, Any]] = {
        "sampling": {"prompts": 4, "siblings": 2, "prompt_tokens": (8, 24), "new_tokens": 12},
        "grpo": {"prompts": 4, "siblings": 2, "prompt_tokens": (8, 24), "new_tokens": 12},
        "sft": {"rows": 8, "steps": 2, "longest": 128},
        "dpo": {"rows": 4, "steps": 2, "longest": 768},
        "turns": {"prompts": 3, "turns": 3, "prompt_tokens": (8, 24), "new_tokens": 6, "user_tokens": 5},
        "first_token": {"prompts": 3, "prompt_tokens": (8, 24)},
    }
    found = []
    for workload in catalogue():
        sizes = {**workload.sizes, **small[workload.kind]}
        if workload.kind == "sampling" and not workload.sizes.get("mixed"):
            sizes |= {"siblings": 1, "prompts": 8}
        found.append(Workload(**{**asdict(workload), "shape": "tiny", "sizes": sizes}))
    return tuple(found)


def chosen(names: Sequence[str], workloads: Sequence[Workload]) -> list[Workload]:
    """Workloads whose name is given or begins with a given word.

    Raises:
        ValueError: a word fits none.
    """
    if not names:
        return list(workloads)
    for word in names:
        if not any(_fits(workload.name, word) for workload in workloads):
            raise ValueError(f"no workload {word!r}; there are: {', '.join(workload.name for workload in workloads)}")
    return [workload for workload in workloads if any(_fits(workload.name, word) for word in names)]


def _fits(name: str, word: str) -> bool:
    return name == word or name.startswith(word + "-")


def _sampling() -> tuple[Workload, ...]:
    uniform = {"prompts": 64, "siblings": 1, "prompt_tokens": (16, 64), "mixed": False}
    mixed = {"prompts": 32, "siblings": 8, "prompt_tokens": (32, 512), "new_tokens": 256, "mixed": True}
    found = []
    for shape in ("3m", "25m"):
        for new_tokens in (64, 256):
            found.append(
                Workload(
                    name=f"uniform-{shape}-{new_tokens}",
                    kind="sampling",
                    shape=shape,
                    unit="tokens",
                    sizes={**uniform, "new_tokens": new_tokens},
                    bar=3.0,
                    aim=5.0,
                )
            )
        found.append(
            Workload(name=f"mixed-{shape}", kind="sampling", shape=shape, unit="tokens", sizes=mixed, bar=6.0, aim=10.0)
        )
    large = {**uniform, "new_tokens": 64}
    found.append(Workload(name="uniform-125m-64", kind="sampling", shape="125m", unit="tokens", sizes=large))
    wide = {**large, "prompts": 256, "prompt_tokens": (16, 32)}
    found.append(
        Workload(
            name="decode-share-25m",
            kind="sampling",
            shape="25m",
            unit="tokens",
            sizes=wide,
            measure="share",
            bar=0.30,
            aim=0.45,
        )
    )
    return tuple(found)


def _grpo() -> tuple[Workload, ...]:
    found = []
    for shape in ("3m", "25m"):
        for mixed, prompt_tokens, bar, aim in ((False, (32, 64), 1.8, 2.5), (True, (32, 512), 4.0, 6.0)):
            sizes = {"prompts": 16, "siblings": 8, "prompt_tokens": prompt_tokens, "mixed": mixed}
            sizes |= {"new_tokens": 256 if mixed else 64}
            name = f"grpo-{'mixed' if mixed else 'uniform'}-{shape}"
            found.append(Workload(name=name, kind="grpo", shape=shape, unit="tokens", sizes=sizes, bar=bar, aim=aim))
    return tuple(found)


def _training() -> tuple[Workload, ...]:
    found = []
    for shape, rows, steps in (("3m", 128, 4), ("25m", 64, 4), ("125m", 16, 2)):
        bars = {"bar": 2.0, "aim": 3.0} if shape != "125m" else {}
        sizes = {"rows": rows, "steps": steps, "longest": 1024}
        found.append(Workload(name=f"sft-{shape}", kind="sft", shape=shape, unit="tokens", sizes=sizes, **bars))
        if shape != "125m":
            sizes = {"rows": rows // 2, "steps": steps, "longest": 1024}
            found.append(Workload(name=f"dpo-{shape}", kind="dpo", shape=shape, unit="pairs", sizes=sizes, **bars))
    sizes = {"rows": 32, "steps": 2, "longest": 512, "whole": True}
    found.append(
        Workload(
            name="train-share-25m",
            kind="sft",
            shape="25m",
            unit="tokens",
            sizes=sizes,
            measure="share",
            bar=0.50,
            aim=0.60,
        )
    )
    sizes = {"rows": 1, "steps": 1, "longest": 4096, "whole": True}
    found.append(
        Workload(
            name="sft-memory-152k",
            kind="sft",
            shape="125m",
            unit="tokens",
            sizes=sizes,
            measure="memory",
            bar=0.5,
            aim=0.25,
        )
    )
    return tuple(found)


def _others() -> tuple[Workload, ...]:
    turns = {"prompts": 16, "turns": 5, "prompt_tokens": (64, 128), "new_tokens": 48, "user_tokens": 32}
    first = {"prompts": 16, "prompt_tokens": (64, 512)}
    return (
        Workload(name="turns-25m", kind="turns", shape="25m", unit="tokens", sizes=turns),
        Workload(
            name="first-token-25m", kind="first_token", shape="25m", unit="requests", sizes=first, bar=1.5, aim=3.0
        ),
    )
