"""Two models' hidden states → divergence of their next-token distributions, without all logits in memory at once.

Shapes: N tokens, D width of the student, E width of the teacher, V vocabulary, K tokens whose probability is asked for.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from posttrain.core import ModelError
from posttrain.models.token_stats import HasHead, default_chunk, head_dtype, head_product

_KEPT = 1 << 22  # up to so many probabilities of each model are kept for backward (2 × 16 MiB)


class TokenDivergence(NamedTuple):
    """What student and teacher say at each target, fp32."""

    logprobs_N: Tensor  # of the target under the student, at temperature 1; differentiable
    entropy_N: Tensor | None  # of the student at temperature 1, in nats, no gradient
    divergence_N: Tensor  # in nats; differentiable
    teacher_logprobs_N: Tensor  # of the target under the teacher, at temperature 1; no gradient


def token_divergence(
    student: HasHead,
    hidden_ND: Tensor,
    teacher: HasHead,
    teacher_hidden_NE: Tensor,
    targets_N: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk: int | None = None,
    entropy: bool = False,
) -> TokenDivergence:
    """Generalised Jensen–Shannon divergence of softmax(logits / temperature), and the targets' logprobs.

    With teacher p, student q and m = beta · p + (1 − beta) · q: beta · KL(p ‖ m) + (1 − beta) · KL(q ‖ m); beta 0 is
    KL(p ‖ q), beta 1 is KL(q ‖ p), as in `objectives.generalised_jsd`. Both models' logits are made a chunk of tokens
    at a time, reduced, dropped, and made again in backward; where all of them are few, they are kept instead.
    Everything after the products is fp32.

    Args:
        student: only its output head is used.
        hidden_ND: the student's states that predict the targets.
        teacher: only its output head is used; it may be of another width.
        teacher_hidden_NE: the teacher's states at the same places; no gradient.
        targets_N: token ids.
        beta: 0 (forward KL) to 1 (reverse KL).
        temperature: divides both models' logits for the divergence, not for the logprobs.
        vocab_size: compare the first so many entries only, as if there were no others: for heads of one vocabulary
            that are padded to different sizes.
        chunk: tokens per chunk; None chooses by the vocabulary. The result does not depend on it but for rounding.
        entropy: also give the entropy of the student's distributions.

    Raises:
        ModelError: shapes do not fit, the vocabularies differ, beta or temperature is out of range.
    """
    weight_VD, teacher_VE = student.head_weight()[:vocab_size], teacher.head_weight()[:vocab_size]
    _check(hidden_ND, teacher_hidden_NE, targets_N, weight_VD, teacher_VE, beta, temperature)
    plan = _Plan(
        beta=beta,
        temperature=temperature,
        chunk=chunk or max(32, default_chunk(hidden_ND, weight_VD) // 2),
        keep=chunk is None and hidden_ND.shape[0] * weight_VD.shape[0] <= _KEPT,
        entropy=entropy,
        exact=(student.exact_logits, teacher.exact_logits),
        dtypes=(head_dtype(weight_VD), head_dtype(teacher_VE)),
    )
    logprobs_N, divergence_N, entropy_N, teacher_N = _Divergence.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, teacher_hidden_NE.detach(), teacher_VE.detach(), targets_N, plan
    )
    return TokenDivergence(logprobs_N, entropy_N if entropy else None, divergence_N, teacher_N)


def chosen_logprobs(
    model: HasHead, hidden_ND: Tensor, ids_NK: Tensor, *, temperature: float = 1.0, chunk: int | None = None
) -> Tensor:
    """Logprobs of K tokens at each place under softmax(logits / temperature), NK, fp32; differentiable.

    For a teacher that tells only its K most likely tokens. Memory is that of a chunk of logits.

    Args:
        model: only its output head is used.
        hidden_ND: the states that predict.
        ids_NK: token ids; one may come twice in a row.
        temperature: divides the logits.
        chunk: tokens per chunk; None chooses by the vocabulary.

    Raises:
        ModelError: shapes do not fit, or the temperature is not above 0.
    """
    if hidden_ND.ndim != 2 or ids_NK.ndim != 2 or len(ids_NK) != len(hidden_ND):
        raise ModelError(f"chosen_logprobs takes hidden ND and ids NK, not {hidden_ND.shape} and {ids_NK.shape}")
    if not temperature > 0:
        raise ModelError(f"temperature must be above 0 to give logprobs, not {temperature}")
    weight_VD = model.head_weight()
    plan = _Plan(
        beta=0.0,
        temperature=temperature,
        chunk=chunk or default_chunk(hidden_ND, weight_VD),
        keep=False,
        entropy=False,
        exact=(model.exact_logits, True),
        dtypes=(head_dtype(weight_VD), torch.float32),
    )
    logprobs_NK: Tensor = _Chosen.apply(hidden_ND, weight_VD, ids_NK, plan)  # type: ignore[no-untyped-call]
    return logprobs_NK


def _check(
    hidden_ND: Tensor,
    teacher_NE: Tensor,
    targets_N: Tensor,
    weight_VD: Tensor,
    teacher_VE: Tensor,
    beta: float,
    temperature: float,
) -> None:
    if hidden_ND.ndim != 2 or teacher_NE.ndim != 2 or not len(hidden_ND) == len(teacher_NE) == len(targets_N):
        shapes = [tuple(tensor.shape) for tensor in (hidden_ND, teacher_NE, targets_N)]
        raise ModelError(f"token_divergence takes hidden ND, teacher's hidden NE and targets N, not {shapes}")
    if weight_VD.shape[0] != teacher_VE.shape[0]:
        raise ModelError(
            f"the student's head has {weight_VD.shape[0]} entries, the teacher's {teacher_VE.shape[0]}: "
            "a divergence needs one vocabulary"
        )
    if not 0 <= beta <= 1:
        raise ModelError(f"beta must lie between 0 (forward KL) and 1 (reverse KL), not {beta}")
    if not temperature > 0:
        raise ModelError(f"temperature must be above 0, not {temperature}")


class _Plan(NamedTuple):
    """How to go through the tokens."""

    beta: float
    temperature: float
    chunk: int
    keep: bool  # keep the log-probabilities for backward
    entropy: bool
    exact: tuple[bool, bool]  # student, teacher
    dtypes: tuple[torch.dtype, torch.dtype]  # of the products: student, teacher


class _Pair(NamedTuple):
    """Log-probabilities of a chunk of tokens; the second pair is None where the temperature is 1."""

    student_NV: Tensor  # at the temperature
    teacher_NV: Tensor
    student_1_NV: Tensor | None  # at temperature 1
    teacher_1_NV: Tensor | None


def _pair(hidden_ND: Tensor, weight_VD: Tensor, teacher_NE: Tensor, teacher_VE: Tensor, plan: _Plan) -> _Pair:
    student_NV = head_product(hidden_ND, weight_VD, plan.dtypes[0], plan.exact[0])
    teacher_NV = head_product(teacher_NE, teacher_VE, plan.dtypes[1], plan.exact[1])
    if plan.temperature == 1.0:
        return _Pair(student_NV.log_softmax(-1), teacher_NV.log_softmax(-1), None, None)
    return _Pair(
        (student_NV / plan.temperature).log_softmax(-1),
        (teacher_NV / plan.temperature).log_softmax(-1),
        student_NV.log_softmax(-1),
        teacher_NV.log_softmax(-1),
    )


def _divergence(log_q_NV: Tensor, log_p_NV: Tensor, beta: float) -> Tensor:
    if beta == 0:
        return _kl(log_p_NV, log_q_NV)
    if beta == 1:
        return _kl(log_q_NV, log_p_NV)
    log_m_NV = torch.logaddexp(log_p_NV + math.log(beta), log_q_NV + math.log1p(-beta))
    return beta * _kl(log_p_NV, log_m_NV) + (1 - beta) * _kl(log_q_NV, log_m_NV)


def _kl(of_NV: Tensor, to_NV: Tensor) -> Tensor:
    kl_N: Tensor = torch.linalg.vecdot(of_NV.exp(), of_NV - to_NV)
    return kl_N


def _pull(log_q_NV: Tensor, log_p_NV: Tensor, beta: float) -> Tensor:
    """d divergence / d logits of the student, at temperature 1 of these log-probabilities: sums to 0 over V.

    Forward KL: q − p. Otherwise q · (g − Σ_v q_v g_v) with g = log q − log p (reverse) or (1 − beta) · (log q − log m).
    """
    if beta == 0:
        return log_q_NV.exp().sub_(log_p_NV.exp())
    if beta == 1:
        gain_NV = log_q_NV - log_p_NV
    else:
        log_m_NV = torch.logaddexp(log_p_NV + math.log(beta), log_q_NV + math.log1p(-beta))
        gain_NV = log_m_NV.neg_().add_(log_q_NV).mul_(1 - beta)
    q_NV = log_q_NV.exp()
    gain_NV -= torch.linalg.vecdot(q_NV, gain_NV)[:, None]
    return gain_NV.mul_(q_NV)


class _Divergence(torch.autograd.Function):
    """Gradients in the student's states and head; the teacher has none."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        teacher_NE: Tensor,
        teacher_VE: Tensor,
        targets_N: Tensor,
        plan: _Plan,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        num_tokens = len(hidden_ND)
        logprobs_N, divergence_N, entropy_N, told_N = (
            hidden_ND.new_zeros(num_tokens, dtype=torch.float32) for _ in range(4)
        )
        keep = plan.keep and plan.temperature == 1.0 and any(ctx.needs_input_grad[:2])
        kept: list[Tensor] = []
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for start in range(0, num_tokens, plan.chunk):
                part = slice(start, start + plan.chunk)
                pair = _pair(hidden_ND[part], weight_VD, teacher_NE[part], teacher_VE, plan)
                plain_NV = pair.student_NV if pair.student_1_NV is None else pair.student_1_NV
                teacher_NV = pair.teacher_NV if pair.teacher_1_NV is None else pair.teacher_1_NV
                logprobs_N[part] = plain_NV.gather(1, targets_N[part, None])[:, 0]
                told_N[part] = teacher_NV.gather(1, targets_N[part, None])[:, 0]
                divergence_N[part] = _divergence(pair.student_NV, pair.teacher_NV, plan.beta)
                if plan.entropy:
                    entropy_N[part] = -torch.linalg.vecdot(plain_NV.exp(), plain_NV)
                if keep:
                    kept += [pair.student_NV, pair.teacher_NV]
        ctx.save_for_backward(hidden_ND, weight_VD, teacher_NE, teacher_VE, targets_N, *kept)
        ctx.plan = plan
        ctx.mark_non_differentiable(entropy_N, told_N)
        return logprobs_N, divergence_N, entropy_N, told_N

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs_N: Tensor, grad_divergence_N: Tensor, *ignored: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        hidden_ND, weight_VD, teacher_NE, teacher_VE, targets_N, *kept = ctx.saved_tensors
        plan: _Plan = ctx.plan
        grads = _Gradients(hidden_ND, weight_VD, plan.dtypes[0], ctx.needs_input_grad)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for index, start in enumerate(range(0, len(hidden_ND), plan.chunk)):
                part = slice(start, start + plan.chunk)
                if kept:
                    pair = _Pair(kept[2 * index], kept[2 * index + 1], None, None)
                else:
                    pair = _pair(hidden_ND[part], weight_VD, teacher_NE[part], teacher_VE, plan)
                plain_NV = pair.student_NV if pair.student_1_NV is None else pair.student_1_NV
                grad_NV = _pull(pair.student_NV, pair.teacher_NV, plan.beta)
                grad_NV.mul_(grad_divergence_N[part, None] / plan.temperature)
                grad_NV.sub_(plain_NV.exp().mul_(grad_logprobs_N[part, None]))
                grad_NV.scatter_add_(1, targets_N[part, None], grad_logprobs_N[part, None])
                grads.add(part, grad_NV)
        return *grads.finish(), None, None, None, None


class _Chosen(torch.autograd.Function):
    """d logprob_k / dz = onehot(id_k) − softmax(z), z = logits / temperature."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, ids_NK: Tensor, plan: _Plan) -> Tensor:
        logprobs_NK = hidden_ND.new_empty(ids_NK.shape, dtype=torch.float32)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for start in range(0, len(hidden_ND), plan.chunk):
                part = slice(start, start + plan.chunk)
                logits_NV = head_product(hidden_ND[part], weight_VD, plan.dtypes[0], plan.exact[0]).div_(
                    plan.temperature
                )
                logprobs_NK[part] = logits_NV.gather(1, ids_NK[part]) - logits_NV.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(hidden_ND, weight_VD, ids_NK)
        ctx.plan = plan
        return logprobs_NK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NK: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_ND, weight_VD, ids_NK = ctx.saved_tensors
        plan: _Plan = ctx.plan
        grads = _Gradients(hidden_ND, weight_VD, plan.dtypes[0], ctx.needs_input_grad)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for start in range(0, len(hidden_ND), plan.chunk):
                part = slice(start, start + plan.chunk)
                logits_NV = head_product(hidden_ND[part], weight_VD, plan.dtypes[0], plan.exact[0]).div_(
                    plan.temperature
                )
                grad_NV = logits_NV.softmax(-1).mul_(-grad_NK[part].sum(-1, keepdim=True))
                grads.add(part, grad_NV.scatter_add_(1, ids_NK[part], grad_NK[part]).div_(plan.temperature))
        return *grads.finish(), None, None


class _Gradients:
    """Adds up the gradients of hidden states and head, chunk by chunk."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, dtype: torch.dtype, needed: tuple[bool, ...]) -> None:
        self.inputs_ND, self.weight_VD, self.dtype = hidden_ND, weight_VD, dtype
        self.product_VD = weight_VD.to(dtype)
        self.hidden_ND = torch.empty_like(hidden_ND) if needed[0] else None
        self.head_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needed[1] else None

    def add(self, part: slice, grad_NV: Tensor) -> None:
        """One chunk's gradient of the logits."""
        grad_NV = grad_NV.to(self.dtype)
        if self.hidden_ND is not None:
            self.hidden_ND[part] = (grad_NV @ self.product_VD).to(self.hidden_ND.dtype)
        if self.head_VD is not None:
            self.head_VD += grad_NV.T @ self.inputs_ND[part].to(self.dtype)

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """What was added up, in the types of hidden states and head."""
        return self.hidden_ND, None if self.head_VD is None else self.head_VD.to(self.weight_VD.dtype)
