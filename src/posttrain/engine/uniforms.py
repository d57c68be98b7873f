"""Random numbers by counter: one number for (seed, position), whoever else is in the batch.

N rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def uniforms(seeds_N: NDArray[np.uint64], positions_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """The `position`-th number of SplitMix64 started at `seed`, as a uniform in [0, 1).

    Each row's number depends on its own seed and position only: a request draws the same alone and in a crowd.

    Args:
        seeds_N: one 64-bit seed per row.
        positions_N: how many tokens the row has sampled before, from 0.

    Returns:
        Float64 multiples of 2**-52, so that `u * total < total` holds in float64 for every positive total.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, figure 17.
    """
    state = seeds_N + _GAMMA * (positions_N.astype(np.uint64) + np.uint64(1))
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    state = state ^ (state >> np.uint64(31))
    numbers: NDArray[np.float64] = (state >> np.uint64(12)).astype(np.float64) * 2.0**-52
    return numbers
