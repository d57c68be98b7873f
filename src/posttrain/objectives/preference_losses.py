"""One number for each pair: the losses of the DPO family. `preference_loss` makes a step's loss of them.

In every formula ρ_w and ρ_l are the log-ratios log π/π_ref of the chosen and the rejected answer, Δ = ρ_w − ρ_l their
margin, σ the logistic function. All functions take `Pairs` of E pairs and give losses_E, differentiable in the policy's
logprobs. They may be added with weights, as in MPO (https://arxiv.org/abs/2411.10442):
0.8 · dpo_losses + 0.2 · bco_pair_losses + 1.0 · nll_losses.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from posttrain.objectives.preference import Pairs


def dpo_losses(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO, and with label smoothing ε conservative DPO (cDPO).

        − (1 − ε) · log σ(β·Δ) − ε · log σ(−β·Δ)

    Length-normalised DPO (Tülu 3; TRL's `sigmoid_norm`) is the same of `pairs.per_token()`. CPO's preference term is
    the same of pairs without reference.

    Args:
        pairs: sequence logprobs.
        beta: strength of the pull to the reference; 0.1 with sums, 5 with means over tokens (Tülu 3).
        label_smoothing: ε, the assumed share of flipped preferences, in [0, 0.5).

    Source: Rafailov et al., https://arxiv.org/abs/2305.18290, equation 7; Mitchell, "A note on DPO with noisy
    preferences", https://ericmitchell.ai/cdpo.pdf; Tülu 3, https://arxiv.org/abs/2411.15124.
    """
    return _of_difference(pairs.margin_E, beta, label_smoothing)


def robust_losses(pairs: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO: an unbiased estimate of DPO's loss on clean labels where a share ε of them is flipped.

        ( − (1 − ε) · log σ(β·Δ) + ε · log σ(−β·Δ) ) / (1 − 2·ε)

    Source: Chowdhury et al., https://arxiv.org/abs/2403.00409, section 3.1 (ε = 0.1 in section 6).
    """
    _check_smoothing(label_smoothing)
    logits_E = beta * pairs.margin_E
    clean_E = -F.logsigmoid(logits_E) * (1 - label_smoothing)
    return (clean_E + F.logsigmoid(-logits_E) * label_smoothing) / (1 - 2 * label_smoothing)


def ipo_losses(pairs: Pairs, *, tau: float, per_token: bool = True) -> Tensor:
    """IPO: a squared loss, which does not push the margin to infinity.

        ( Δ − 1 / (2·τ) )²

    The paper states Δ of sums over tokens (`per_token=False`); its authors normalise by length in their experiments,
    and so does TRL: with `per_token=True` Δ is the difference of means over tokens.

    Source: Azar et al., https://arxiv.org/abs/2310.12036, equation 17.
    """
    assert tau > 0, f"tau is {tau}, not positive"
    margin_E = pairs.per_token().margin_E if per_token else pairs.margin_E
    return (margin_E - 1 / (2 * tau)).square()


def hinge_losses(pairs: Pairs, *, beta: float, delta: float = 1.0) -> Tensor:
    """SLiC's calibration loss on implicit rewards (RSO's `hinge-norm`; TRL's `hinge`).

        max(0, δ − β·Δ)

    SLiC-HF as published has no reference and β = 1: give pairs without reference and the margin δ.

    Source: Zhao et al., https://arxiv.org/abs/2305.10425, section 2; with a reference: Liu et al.,
    https://arxiv.org/abs/2309.06657.
    """
    return F.relu(delta - beta * pairs.margin_E)


def exo_losses(pairs: Pairs, *, beta: float, label_smoothing: float = 1e-3) -> Tensor:
    """EXO for pairs: the reverse KL from the policy's choice between the two to the (smoothed) annotator's.

        q = σ(β·Δ);   q · (log q − log(1 − ε)) + (1 − q) · (log(1 − q) − log ε)

    Args:
        pairs: sequence logprobs.
        beta: β_π.
        label_smoothing: ε > 0, the annotator's chance of preferring the other; the KL is infinite at 0.

    Source: Ji et al., https://arxiv.org/abs/2402.00856, equation 16 (ε = 1e-3).
    """
    assert 0 < label_smoothing < 0.5, f"EXO's label smoothing is {label_smoothing}, not in (0, 0.5)"
    logits_E = beta * pairs.margin_E
    chosen_E = logits_E.sigmoid() * (F.logsigmoid(logits_E) - math.log1p(-label_smoothing))
    return chosen_E + (-logits_E).sigmoid() * (F.logsigmoid(-logits_E) - math.log(label_smoothing))


def nca_losses(pairs: Pairs, *, beta: float) -> Tensor:
    """NCA for pairs: noise contrastive estimation, which holds the chosen answer's likelihood up in absolute terms.

        − log σ(β·ρ_w) − ½ · log σ(−β·ρ_w) − ½ · log σ(−β·ρ_l)

    Source: Chen et al., https://arxiv.org/abs/2402.05369, section 4.1, with K = 2 and a hard preference.
    """
    chosen_E, rejected_E = beta * pairs.chosen_ratio_E, beta * pairs.rejected_ratio_E
    return -F.logsigmoid(chosen_E) - 0.5 * F.logsigmoid(-chosen_E) - 0.5 * F.logsigmoid(-rejected_E)


def bco_pair_losses(pairs: Pairs, *, beta: float) -> Tensor:
    """BCO on pairs, without its reward shift (TRL's `bco_pair`): each answer is classified by itself.

        − log σ(β·ρ_w) − log σ(−β·ρ_l)

    `bco` has the shift, and takes answers that are no pairs.

    Source: Jung et al., https://arxiv.org/abs/2404.04656, section 4.
    """
    return -F.logsigmoid(beta * pairs.chosen_ratio_E) - F.logsigmoid(-beta * pairs.rejected_ratio_E)


def apo_zero_losses(pairs: Pairs, *, beta: float) -> Tensor:
    """APO-zero: raise the chosen, lower the rejected; for chosen answers better than the model's own.

        1 − σ(β·ρ_w) + σ(β·ρ_l)

    The paper leaves the constant 1 out; TRL has it, and it changes no gradient.

    Source: D'Oosterlinck et al., https://arxiv.org/abs/2408.06266, equation 7.
    """
    return (-beta * pairs.chosen_ratio_E).sigmoid() + (beta * pairs.rejected_ratio_E).sigmoid()


def apo_down_losses(pairs: Pairs, *, beta: float) -> Tensor:
    """APO-down: lower both, the rejected one more; for models better than the chosen answers.

        σ(β·ρ_w) + 1 − σ(β·Δ)

    Source: D'Oosterlinck et al., https://arxiv.org/abs/2408.06266, equation 8 (plus the constant 1, as in TRL).
    """
    return (beta * pairs.chosen_ratio_E).sigmoid() + (-beta * pairs.margin_E).sigmoid()


def sppo_losses(pairs: Pairs, *, beta: float) -> Tensor:
    """SPPO with hard labels: the chosen answer wins with probability 1.

        (ρ_w − 1/(2·β))² + (ρ_l + 1/(2·β))²

    The paper's η is 1/β (η = 1e3), and its soft form has η·(P − ½) for ½·η.

    Source: Wu et al., https://arxiv.org/abs/2405.00675, equation 4.7.
    """
    assert beta > 0, f"beta is {beta}, not positive"
    goal = 0.5 / beta
    return (pairs.chosen_ratio_E - goal).square() + (pairs.rejected_ratio_E + goal).square()


def discopop_losses(pairs: Pairs, *, beta: float, tau: float = 0.05) -> Tensor:
    """DiscoPOP (log-ratio modulated loss): between the logistic and the exponential loss.

        m = σ(β·Δ / τ);   (1 − m) · (− log σ(β·Δ)) + m · exp(−β·Δ)

    It is not convex in Δ; at Δ = 0 it is ½ · log 2 + ½.

    Source: Lu et al., https://arxiv.org/abs/2406.08414, equation 5 (β = τ = 0.05).
    """
    logits_E = beta * pairs.margin_E
    modulation_E = (logits_E / tau).sigmoid()
    return -F.logsigmoid(logits_E) * (1 - modulation_E) + (-logits_E).exp() * modulation_E


def aot_losses(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT on pairs: the policy's log-ratios between chosen and rejected dominate the reference's, quantile by quantile.

        u = sort(log π(w)/π(l));  v = sort(log π_ref(w)/π_ref(l));   DPO's loss of β·(u_k − v_k)

    Both are sorted over the pairs that are given: the loss of a pair depends on the others. All pairs of a step must be
    given together, or the loss is another one. losses_E is in sorted order and belongs to no pair alone, so it cannot
    be weighted by pair.

    Source: Melnyk et al., https://arxiv.org/abs/2406.05882, section 3 (paired).
    """
    policy_E = (pairs.chosen_E - pairs.rejected_E).sort().values
    reference_E = (pairs.ref_chosen_E - pairs.ref_rejected_E).detach().sort().values
    return _of_difference(policy_E - reference_E, beta, label_smoothing)


def aot_unpaired_losses(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """AOT without pairing: the chosen answers' log-ratios dominate the rejected ones', quantile by quantile.

        u = sort(ρ_w);  v = sort(ρ_l);   DPO's loss of β·(u_k − v_k)

    What `aot_losses` says of sorting holds here.

    Source: Melnyk et al., https://arxiv.org/abs/2406.05882, section 3 (unpaired).
    """
    difference_E = pairs.chosen_ratio_E.sort().values - pairs.rejected_ratio_E.sort().values
    return _of_difference(difference_E, beta, label_smoothing)


def simpo_losses(pairs: Pairs, *, beta: float, gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """SimPO: the mean logprob of a token as reward, without reference, and a margin γ between the two.

        − log σ( β·(log π(w)/|w| − log π(l)/|l|) − γ )

    Source: Meng et al., https://arxiv.org/abs/2405.14734, equation 6 (β 2.0 to 2.5, γ 0.3 to 1.6). Together with
    `nll_losses` it is CPO-SimPO.
    """
    margin_E = pairs.chosen_E / pairs.chosen_tokens_E - pairs.rejected_E / pairs.rejected_tokens_E
    return _of_difference(margin_E - gamma / beta, beta, label_smoothing)


def orpo_losses(pairs: Pairs) -> Tensor:
    """ORPO's odds-ratio term: the chosen answer's odds against the rejected one's.

        p = exp(log π(y)/|y|);   − log σ( log p_w/(1 − p_w) − log p_l/(1 − p_l) )

    The whole loss adds the NLL of the chosen answer: nll_losses + λ · orpo_losses, λ = 0.1.

    Source: Hong et al., https://arxiv.org/abs/2403.07691, equations 4 and 7.
    """
    return -F.logsigmoid(orpo_log_odds(pairs))


def orpo_log_odds(pairs: Pairs) -> Tensor:
    """ORPO's log odds ratio of each pair, E; TRL's metric `log_odds_chosen` is its mean."""
    chosen_E = pairs.chosen_E / pairs.chosen_tokens_E
    rejected_E = pairs.rejected_E / pairs.rejected_tokens_E
    return chosen_E - rejected_E - (_log1m_exp(chosen_E) - _log1m_exp(rejected_E))


def nll_losses(chosen_E: Tensor, divisor: Tensor | float) -> Tensor:
    """Negative log-likelihood of the chosen answers, to be added to a preference loss with a weight.

        − log π(w) / divisor

    What divides decides what is averaged, once `preference_loss` divides by the number of pairs:

        the answer's own tokens            each answer counts the same: RPO (Iterative RPO, Llama 3)
        chosen tokens of the step / pairs  each token counts the same: TRL's `sft`, CPO and ORPO trainers
        1                                  log-likelihood of whole answers: CPO's paper

    Args:
        chosen_E: log-likelihood of each chosen answer (and its prompt, for ORPO as its authors ran it).
        divisor: E tokens, or one number; positive.

    Source: Pang et al., https://arxiv.org/abs/2404.19733 (weight 1); Llama 3,
    https://arxiv.org/abs/2407.21783, section 4.1.4 (weight 0.2); CPO, https://arxiv.org/abs/2401.08417.
    """
    return -chosen_E / divisor


def _of_difference(difference_E: Tensor, beta: float, label_smoothing: float) -> Tensor:
    _check_smoothing(label_smoothing)
    logits_E = beta * difference_E
    losses_E = -F.logsigmoid(logits_E) * (1 - label_smoothing)
    return losses_E - F.logsigmoid(-logits_E) * label_smoothing if label_smoothing else losses_E


def _log1m_exp(x_E: Tensor) -> Tensor:
    """log(1 − e^x) for x < 0, exact near 0 and far from it."""
    x_E = x_E.clamp(max=-1e-7)  # a probability of 1 has infinite odds
    near_E = (-x_E.clamp(min=-math.log(2)).expm1()).log()
    far_E = (-x_E.clamp(max=-math.log(2)).exp()).log1p()
    return near_E.where(x_E > -math.log(2), far_E)


def _check_smoothing(label_smoothing: float) -> None:
    assert 0 <= label_smoothing < 0.5, f"label smoothing is {label_smoothing}, not in [0, 0.5)"
