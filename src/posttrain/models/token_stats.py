"""Hidden states → logprobs of the targets and entropies, without all logits in memory at once.

Shapes: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from posttrain.core import ModelError
from posttrain.models import token_stats_tiled
from posttrain.models.products import times_transposed

_KEPT = 1 << 23  # up to so many probabilities are kept for backward rather than computed again (32 MiB)
_CHUNK = 1 << 21  # logits of a chunk by default: 8 MiB on a CPU, near its cache
_CHUNK_WIDE = 1 << 24  # of a chunk under a large vocabulary: 64 MiB
_CHUNK_CUDA = 1 << 27  # 512 MiB
_HAS_OUT_DTYPE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


class HasHead(Protocol):
    """What `token_stats` needs of a model."""

    exact_logits: bool

    def head_weight(self) -> Tensor:
        """The output head, VD."""
        ...


class TokenStats(NamedTuple):
    """Statistics of each target's distribution, fp32."""

    logprobs_N: Tensor  # natural logarithm of the target's probability
    entropy_N: Tensor | None  # in nats


def token_stats(
    model: HasHead,
    hidden_ND: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
    entropy: bool = False,
) -> TokenStats:
    """Logprobs of the targets under softmax(logits / temperature), differentiable in hidden states and head.

    Logits are made a chunk of tokens at a time, reduced, dropped, and made again in backward, so memory is that of a
    chunk; where all of them are few, they are kept instead. Everything after the product is fp32.

    Args:
        model: the decoder; only its output head is used.
        hidden_ND: from `Decoder.hidden`, the states that predict the targets, flattened over sequences.
        targets_N: token ids.
        temperature: divides the logits.
        chunk: tokens per chunk; None chooses by the vocabulary. The result does not depend on it but for rounding.
        entropy: also give each distribution's entropy.

    Raises:
        ModelError: shapes do not fit, or the temperature is not above 0.
    """
    if hidden_ND.ndim != 2 or targets_N.shape != hidden_ND.shape[:1]:
        raise ModelError(f"token_stats takes hidden ND and targets N, not {hidden_ND.shape} and {targets_N.shape}")
    if not temperature > 0:
        raise ModelError(f"temperature must be above 0 to give logprobs, not {temperature}")
    weight_VD = model.head_weight()
    if chunk is None and token_stats_tiled.fits(hidden_ND, weight_VD, head_dtype(weight_VD), model.exact_logits):
        with torch.autocast("cpu", enabled=False):
            stats = token_stats_tiled.tiled_stats(hidden_ND, weight_VD, targets_N, temperature, entropy)
        return TokenStats(stats[0], stats[1] if entropy else None)
    plan = _Plan(
        temperature=temperature,
        chunk=chunk or default_chunk(hidden_ND, weight_VD),
        keep=chunk is None and hidden_ND.shape[0] * weight_VD.shape[0] <= _KEPT,
        entropy=entropy,
        exact=model.exact_logits,
        product_dtype=head_dtype(weight_VD),
    )
    logprobs_N, entropy_N = _TokenStats.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, targets_N, plan
    )
    return TokenStats(logprobs_N, entropy_N if entropy else None)


def project(hidden_ND: Tensor, weight_VD: Tensor, *, exact: bool) -> Tensor:
    """Logits in fp32: hidden × head.

    In fp32 without autocast this is a plain product. Where products are in bf16 (bf16 weights, or autocast), CUDA
    gives the unrounded fp32 sums of bf16 products (from PyTorch 2.8 on); a CPU cannot, so there `exact` multiplies in
    fp32, and otherwise the sums are rounded to bf16 on the way.
    """
    dtype = head_dtype(weight_VD)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        if hidden_ND.is_cuda and dtype != torch.float32:
            logits_NV: Tensor = _CudaProject.apply(hidden_ND, weight_VD, dtype)  # type: ignore[no-untyped-call]
            return logits_NV
        return head_product(hidden_ND, weight_VD, dtype, exact)


def head_dtype(weight_VD: Tensor) -> torch.dtype:
    """The type in which the output head's product is made."""
    device = weight_VD.device.type
    if weight_VD.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight_VD.dtype


def head_product(hidden_ND: Tensor, weight_VD: Tensor, dtype: torch.dtype, exact: bool) -> Tensor:
    """Logits in fp32, of a product in `dtype`; with `exact` on a CPU, which rounds such a product, of one in fp32."""
    if dtype == torch.float32 or (exact and not hidden_ND.is_cuda):
        return F.linear(hidden_ND.float(), weight_VD.float())
    if hidden_ND.is_cuda and _HAS_OUT_DTYPE:
        flat = torch.mm(hidden_ND.flatten(0, -2).to(dtype), weight_VD.to(dtype).T, out_dtype=torch.float32)
        return flat.view(*hidden_ND.shape[:-1], -1)
    return F.linear(hidden_ND.to(dtype), weight_VD.to(dtype)).float()


def default_chunk(hidden_ND: Tensor, weight_VD: Tensor) -> int:
    """Tokens whose logits are held at a time."""
    vocab_size = weight_VD.shape[0]
    if hidden_ND.is_cuda:
        return max(64, _CHUNK_CUDA // vocab_size)
    # every chunk adds to the whole head's gradient: few tokens a chunk make that dearer than the products
    return max(64, _CHUNK // vocab_size, min(256, _CHUNK_WIDE // vocab_size))


class _CudaProject(torch.autograd.Function):
    """A product of bf16 matrices with fp32 result, which PyTorch does not differentiate by itself."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD)
        ctx.dtype = dtype
        return head_product(hidden_ND, weight_VD, dtype, exact=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NV: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_ND, weight_VD = ctx.saved_tensors
        grad = grad_NV.to(ctx.dtype)
        grad_hidden = (grad @ weight_VD.to(ctx.dtype)).to(hidden_ND.dtype)
        grad_weight = grad.flatten(0, -2).T @ hidden_ND.flatten(0, -2).to(ctx.dtype)
        return grad_hidden, grad_weight.to(weight_VD.dtype), None


class _Plan(NamedTuple):
    """How to go through the tokens."""

    temperature: float
    chunk: int
    keep: bool  # keep the log-probabilities for backward
    entropy: bool
    exact: bool
    product_dtype: torch.dtype


def _log_softmax(hidden_ND: Tensor, weight_VD: Tensor, plan: _Plan) -> Tensor:
    if hidden_ND.device.type == "cpu" and (plan.exact or plan.product_dtype == torch.float32):
        scores_NV = times_transposed(hidden_ND.float(), weight_VD.float())
    else:
        scores_NV = head_product(hidden_ND, weight_VD, plan.product_dtype, plan.exact)
    if plan.temperature != 1.0:
        scores_NV.div_(plan.temperature)
    return torch.log_softmax(scores_NV, -1)


class _TokenStats(torch.autograd.Function):
    """Gradients of z = logits / temperature, with p = softmax(z) and entropy E:

    d logprob / dz = onehot(target) - p,    dE / dz = -p (log p + E).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        num_tokens = hidden_ND.shape[0]
        logprobs_N = hidden_ND.new_empty(num_tokens, dtype=torch.float32)
        entropy_N = hidden_ND.new_zeros(num_tokens, dtype=torch.float32)
        keep = plan.keep and any(ctx.needs_input_grad[:2])
        kept: list[Tensor] = []
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for start in range(0, num_tokens, plan.chunk):
                part = slice(start, start + plan.chunk)
                log_p_NV = _log_softmax(hidden_ND[part], weight_VD, plan)
                logprobs_N[part] = log_p_NV.gather(1, targets_N[part, None])[:, 0]
                if plan.entropy:
                    entropy_N[part] = -torch.linalg.vecdot(log_p_NV.exp(), log_p_NV)
                if keep:
                    kept.append(log_p_NV)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, entropy_N, *kept)
        ctx.plan = plan
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs_N: Tensor, grad_entropy_N: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_ND, weight_VD, targets_N, entropy_N, *kept = ctx.saved_tensors
        plan: _Plan = ctx.plan
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        dtype = plan.product_dtype
        grad_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        with torch.autocast(hidden_ND.device.type, enabled=False):
            weight = weight_VD.to(dtype)
            for index, start in enumerate(range(0, hidden_ND.shape[0], plan.chunk)):
                part = slice(start, start + plan.chunk)
                log_p_NV = kept[index] if kept else _log_softmax(hidden_ND[part], weight_VD, plan)
                grad_NV = log_p_NV.exp()
                pull_N1 = -grad_logprobs_N[part, None]
                if plan.entropy:
                    spread_NV = (log_p_NV + entropy_N[part, None]).mul_(grad_entropy_N[part, None])
                    grad_NV.mul_(pull_N1 - spread_NV)
                else:
                    grad_NV.mul_(pull_N1)
                grad_NV.scatter_add_(1, targets_N[part, None], grad_logprobs_N[part, None])
                grad = grad_NV.div_(plan.temperature).to(dtype)
                if grad_hidden_ND is not None:
                    grad_hidden_ND[part] = times_transposed(grad, weight.T)
                if grad_weight_VD is not None:
                    grad_weight_VD += times_transposed(grad.T, hidden_ND[part].to(dtype).T)
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_ND, grad_weight_VD, None, None
