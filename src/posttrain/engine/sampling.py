"""From logits to tokens, for a whole batch whose rows differ in temperature, truncation and seed.

N rows, V vocabulary, M truncated rows, C candidates, K most likely tokens asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A truncated row nearly always keeps fewer tokens than this; where not, its whole vocabulary is sorted.
_CANDIDATES = 64


@dataclass(frozen=True, kw_only=True)
class RowSampling:
    """How each row of a batch is sampled; fields are None where no row needs them."""

    temperatures_N1: Tensor | None  # None: all 1; greedy rows hold 1 here
    greedy_N: Tensor | None  # bool
    truncated_M: Tensor | None  # int64 row numbers with top-k, top-p or min-p
    top_k_M1: Tensor | None  # int64, V where off
    top_p_M1: Tensor | None
    min_p_M1: Tensor | None
    max_top_k: int = 0  # of rows that only use top-k; V if a row does not
    num_top_logprobs: int = 0  # the most that any row wants
    all_greedy: bool = False  # asked of the device here, once for many steps, and not while sampling

    @staticmethod
    def of(
        temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, num_top_logprobs: int, vocab_size: int
    ) -> RowSampling:
        """From one value per row, on the device of the logits."""
        greedy = temperature == 0
        top_k = torch.where(top_k == 0, vocab_size, top_k.clamp(max=vocab_size))
        truncated = ((top_k < vocab_size) | (top_p < 1) | (min_p > 0)) & ~greedy
        heat = torch.where(greedy, 1.0, temperature).to(torch.float32)
        rows = truncated.nonzero().squeeze(1)
        some = len(rows) > 0
        return RowSampling(
            temperatures_N1=None if bool((heat == 1).all()) else heat[:, None],
            greedy_N=greedy if bool(greedy.any()) else None,
            truncated_M=rows if some else None,
            top_k_M1=top_k[rows, None] if some else None,
            top_p_M1=top_p[rows, None] if some else None,
            min_p_M1=min_p[rows, None] if some else None,
            max_top_k=int(top_k[rows].max()) if some else 0,
            num_top_logprobs=num_top_logprobs,
            all_greedy=bool(greedy.all()),
        )


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """One token per row."""

    tokens_N: Tensor  # int64
    logprobs_N: Tensor  # float32, of the distribution sampled from; 0 for greedy rows, whose distribution is a point
    policy_logprobs_N: Tensor  # float32, temperature 1, no truncation
    valid_N: Tensor  # bool, False where the logits hold NaN or +inf
    top_ids_NK: Tensor | None = None
    top_logprobs_NK: Tensor | None = None  # the policy's own


def sample(logits_NV: Tensor, uniforms_N: Tensor, how: RowSampling) -> Sampled:
    """Draw one token per row by inverting the cumulative distribution at the row's uniform.

    Truncation is applied after temperature, in the order top-k, top-p, min-p; top-p's mass is measured after top-k.
    Of equal logits, greedy rows take the lowest token id.

    Args:
        logits_NV: float32.
        uniforms_N: float64 in [0, 1), one per row.
        how: temperatures and truncation per row.

    Returns:
        Tokens and both logprobs. A row with NaN or +inf logits is marked in `valid_N`; its other values mean nothing.
    """
    heated_NV = logits_NV if how.temperatures_N1 is None else logits_NV / how.temperatures_N1
    if how.all_greedy:
        policy_lse_N1 = logits_NV.logsumexp(-1, keepdim=True)
        tokens_N1 = logits_NV.argmax(-1, keepdim=True)
        logprobs_N1 = torch.zeros_like(policy_lse_N1)
    else:
        # One exponential per logit serves the draw and the normaliser.
        top_N1 = heated_NV.amax(-1, keepdim=True)
        running_NV = (heated_NV - top_N1).exp_().cumsum(-1, dtype=torch.float64)
        lse_N1 = top_N1 + running_NV[:, -1:].log().to(top_N1.dtype)
        policy_lse_N1 = lse_N1 if heated_NV is logits_NV else logits_NV.logsumexp(-1, keepdim=True)
        tokens_N1 = _invert(running_NV, uniforms_N)
        logprobs_N1 = heated_NV.gather(1, tokens_N1) - lse_N1
        if how.truncated_M is not None:
            rows_M = how.truncated_M
            some_M1, some_logprobs_M1 = _sample_truncated(heated_NV[rows_M], lse_N1[rows_M], uniforms_N[rows_M], how)
            tokens_N1 = tokens_N1.index_copy(0, rows_M, some_M1)
            logprobs_N1 = logprobs_N1.index_copy(0, rows_M, some_logprobs_M1)
        if how.greedy_N is not None:
            greedy_N1 = how.greedy_N[:, None]
            tokens_N1 = torch.where(greedy_N1, logits_NV.argmax(-1, keepdim=True), tokens_N1)
            logprobs_N1 = logprobs_N1.masked_fill(greedy_N1, 0.0)
    valid_N = policy_lse_N1.squeeze(1).isfinite()
    policy_N1 = logits_NV.gather(1, tokens_N1) - policy_lse_N1
    top_ids_NK = top_logprobs_NK = None
    if how.num_top_logprobs:
        top_NK, top_ids_NK = logits_NV.topk(min(how.num_top_logprobs, logits_NV.shape[1]), dim=-1)
        top_logprobs_NK = top_NK - policy_lse_N1
    return Sampled(
        tokens_N=tokens_N1.squeeze(1),
        logprobs_N=logprobs_N1.squeeze(1),
        policy_logprobs_N=policy_N1.squeeze(1),
        valid_N=valid_N,
        top_ids_NK=top_ids_NK,
        top_logprobs_NK=top_logprobs_NK,
    )


def _invert(running_NC: Tensor, uniforms_N: Tensor) -> Tensor:
    """Index of the first column at which the running sum exceeds u × total: never one of weight 0.

    The running sum is float64: in float32 that over a large vocabulary would lose its rarest tokens.
    """
    target_N1 = running_NC[:, -1:] * uniforms_N[:, None]
    return torch.searchsorted(running_NC, target_N1, right=True).clamp_(max=running_NC.shape[1] - 1)


def _sample_truncated(heated_MV: Tensor, lse_M1: Tensor, uniforms_M: Tensor, how: RowSampling) -> tuple[Tensor, Tensor]:
    """Tokens and logprobs of rows with top-k, top-p or min-p, drawn in order of falling probability."""
    assert how.top_k_M1 is not None
    assert how.top_p_M1 is not None
    assert how.min_p_M1 is not None
    size = heated_MV.shape[1]
    few = max(_CANDIDATES, how.max_top_k + 1 if how.max_top_k < size else 0)
    # On an accelerator the check below would make the host wait, and a sort is cheap.
    if heated_MV.device.type == "cpu" and few < size // 4:
        top_MC, ids_MC = heated_MV.topk(few, dim=-1)
        keep_MC = _kept(top_MC, lse_M1, how)
        if bool(keep_MC[:, -1].any()):
            top_MC, ids_MC = heated_MV.sort(dim=-1, descending=True, stable=True)
            keep_MC = _kept(top_MC, lse_M1, how)
    else:
        top_MC, ids_MC = heated_MV.sort(dim=-1, descending=True, stable=True)
        keep_MC = _kept(top_MC, lse_M1, how)
    weights_MC = (top_MC - top_MC[:, :1]).exp().masked_fill(~keep_MC, 0.0)
    running_MC = weights_MC.cumsum(-1, dtype=torch.float64)
    place_M1 = _invert(running_MC, uniforms_M)
    logprobs_M1 = weights_MC.gather(1, place_M1).log() - running_MC[:, -1:].log()
    return ids_MC.gather(1, place_M1), logprobs_M1.to(heated_MV.dtype)


def _kept(top_MC: Tensor, lse_M1: Tensor, how: RowSampling) -> Tensor:
    """Which of the sorted candidates survive. The most likely token always does."""
    assert how.top_k_M1 is not None
    assert how.top_p_M1 is not None
    assert how.min_p_M1 is not None
    ranks_C = torch.arange(top_MC.shape[1], device=top_MC.device)
    in_top_k_MC = ranks_C < how.top_k_M1
    probs_MC = (top_MC - lse_M1).exp().to(torch.float64)
    running_MC = probs_MC.cumsum(-1)
    within = torch.where(in_top_k_MC, running_MC, 0.0).amax(-1, keepdim=True)
    mass_M1 = torch.where(how.top_k_M1 < top_MC.shape[1], within, 1.0)
    before_MC = running_MC - probs_MC
    # top_p 1 keeps everything, whatever rounding says of the mass.
    in_top_p_MC = (before_MC < how.top_p_M1 * mass_M1) | (how.top_p_M1 == 1)
    in_min_p_MC = probs_MC >= how.min_p_M1 * probs_MC[:, :1]
    keep_MC = in_top_k_MC & in_top_p_MC & in_min_p_MC
    keep_MC[:, 0] = True
    return keep_MC
