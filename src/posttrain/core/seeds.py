"""Seeds that are derived, never shared: the same names give the same seed on every machine and in every process."""

from __future__ import annotations

import hashlib
import random


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed in [0, 2**63) for one use, from the run's seed and the names of the use.

    `derive_seed(7, "rollout", 12, 3)` depends on nothing but its arguments, so work may be done in any order.
    """
    text = "\x1f".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int) -> random.Random:
    """A Python random generator for one use."""
    return random.Random(derive_seed(seed, *names))
