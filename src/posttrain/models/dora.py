"""DoRA: the norm of every output's weights learns apart from their direction (https://arxiv.org/abs/2402.09353).

F outputs, D inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def row_norms(weight_FD: Tensor) -> Tensor:
    """‖W_f‖₂ of every output f, rank 1, fp32."""
    norms_F: Tensor = torch.linalg.vector_norm(weight_FD.float(), dim=1)
    return norms_F


def gains(norms_F: Tensor, magnitudes: Sequence[tuple[slice, Tensor]]) -> Tensor:
    """What each output is multiplied by: m_f / ‖W_f + s B_f A‖, so that output f has weights of norm m_f.

    The norm is taken for a constant, as section 4.3 of the paper has it: the caller passes it without a graph, which
    saves memory and costs no accuracy.

    Args:
        norms_F: of the adapted matrix, no gradient.
        magnitudes: m of some rows, one entry for each adapted part; other rows keep their norm.

    Returns:
        F factors, fp32, differentiable in the magnitudes.
    """
    pieces, at = [], 0
    for rows, magnitude in magnitudes:
        if rows.start > at:
            pieces.append(torch.ones_like(norms_F[at : rows.start]))
        pieces.append(magnitude.float() / norms_F[rows])
        at = rows.stop
    if at < len(norms_F):
        pieces.append(torch.ones_like(norms_F[at:]))
    return torch.cat(pieces)
