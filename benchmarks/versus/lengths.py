"""How long requests run: prompts spread evenly, completions as real ones do.

Completion lengths are log-normal: most end early, a few run to the limit. Needs the standard library alone.
"""

from __future__ import annotations

import math
import random

SIGMA = 1.0  # of the logarithm of a completion's length


def prompt_lengths(count: int, low: int, high: int, seed: int) -> list[int]:
    """Lengths from `low` to `high`, evenly spread and shuffled, the same on every machine."""
    lengths = [round(low + (high - low) * place / max(1, count - 1)) for place in range(count)]
    random.Random(seed).shuffle(lengths)
    return lengths


def mixed_lengths(count: int, longest: int, seed: int) -> list[int]:
    """Log-normal completion lengths in [1, longest] whose mean is a quarter of `longest`."""
    draw = random.Random(seed)
    normals = [draw.gauss(0.0, SIGMA) for _ in range(count)]
    low, high = -10.0, math.log(longest) + 5.0
    for _ in range(60):  # bisection: the clipped mean rises with the centre
        centre = (low + high) / 2
        lengths = [max(1, min(longest, round(math.exp(centre + SIGMA * normal)))) for normal in normals]
        if sum(lengths) / count < longest / 4:
            low = centre
        else:
            high = centre
    return lengths
