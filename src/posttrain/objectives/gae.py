"""Credit along a sequence: discounted returns, generalised advantage estimation, and whitening.

N tokens that the policy wrote, sequences end to end and each in order; S sequences. Token t is the action, V_t the
value of the state before it, r_t the reward after it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards_N: Tensor,
    values_N: Tensor,
    sequence_N: Tensor,
    num_sequences: int,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_S: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: how much better each token was than the value model expected.

        δ_t = r_t + γ · V_{t+1} − V_t
        A_t = Σ_{k ≥ 0} (γλ)^k · δ_{t+k}
        R_t = A_t + V_t                     what the value model learns

    lam 0 is the one-step error, lam 1 the return minus the value. After the last token V is 0 (the episode is over),
    or `bootstrap_S` (it was cut off).

    Args:
        rewards_N: reward after each token; rank 1.
        values_N: value before each token; rank 1.
        sequence_N: sequence of each token; rank 1, integer.
        num_sequences: S.
        gamma: discount, in [0, 1]; 1 for language models.
        lam: λ, in [0, 1].
        bootstrap_S: value after the last token of each sequence; 0 if None.

    Returns:
        advantages_N and returns_N, no gradient.

    Source: Schulman et al., https://arxiv.org/abs/1506.02438, equation 16.
    """
    assert 0 <= gamma <= 1, f"gamma is {gamma}, not in [0, 1]"
    assert 0 <= lam <= 1, f"lam is {lam}, not in [0, 1]"
    rewards_SL, place_N = _rows(rewards_N.detach(), sequence_N, num_sequences)
    values_SL, _ = _rows(values_N.detach(), sequence_N, num_sequences)
    width = rewards_SL.shape[1]
    live_SL = _rows(torch.ones_like(rewards_N), sequence_N, num_sequences)[0] > 0
    advantages_SL = torch.zeros_like(values_SL)
    after_S = torch.zeros_like(values_SL[:, :1])[:, 0] if bootstrap_S is None else bootstrap_S.detach().to(values_N)
    carried_S = torch.zeros_like(after_S)
    for step in range(width - 1, -1, -1):
        delta_S = rewards_SL[:, step] + gamma * after_S - values_SL[:, step]
        advantages_SL[:, step] = delta_S + gamma * lam * carried_S
        carried_S = torch.where(live_SL[:, step], advantages_SL[:, step], carried_S)
        after_S = torch.where(live_SL[:, step], values_SL[:, step], after_S)
    advantages_N = advantages_SL.reshape(-1)[place_N]
    return advantages_N, advantages_N + values_N.detach()


def discounted_returns(rewards_N: Tensor, sequence_N: Tensor, num_sequences: int, *, gamma: float = 1.0) -> Tensor:
    """The sum of what comes after: R_t = Σ_{k ≥ 0} γ^k · r_{t+k}, within each sequence.

    Args:
        rewards_N: reward after each token; rank 1.
        sequence_N: sequence of each token; rank 1, integer.
        num_sequences: S.
        gamma: discount, in [0, 1].

    Returns:
        returns_N, no gradient. With γ = 1 and the KL penalty among the rewards it is REINFORCE++'s advantage before
        normalisation (https://arxiv.org/abs/2501.03262).
    """
    return gae(rewards_N, torch.zeros_like(rewards_N), sequence_N, num_sequences, gamma=gamma, lam=1.0)[0]


def whiten(values_N: Tensor, *, mask_N: Tensor | None = None, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scale to variance 1, and to mean 0 if `shift_mean`: (x − mean) / √(var + eps), with var over n.

    Args:
        values_N: any shape.
        mask_N: which values count, same shape; the others become 0. All count if None.
        shift_mean: False keeps the mean as it is (for rewards, whose sign means something).
        eps: added to the variance, so that equal values become 0 (plus their mean).

    Returns:
        whitened values, no gradient.

    Source: Ziegler et al., https://arxiv.org/abs/1909.08593; Huang et al., "The N+ Implementation Details of RLHF with
    PPO", https://arxiv.org/abs/2403.17031.
    """
    values_N = values_N.detach()
    counted_N = torch.ones_like(values_N) if mask_N is None else mask_N.to(values_N.dtype)
    values_N = torch.where(counted_N > 0, values_N, torch.zeros_like(values_N))
    count = counted_N.sum().clamp(min=1)
    mean = values_N.sum() / count
    centred_N = (values_N - mean) * counted_N
    scaled_N = centred_N * (centred_N.square().sum() / count + eps).rsqrt()
    return scaled_N if shift_mean else scaled_N + mean * counted_N


def explained_variance(values_N: Tensor, returns_N: Tensor) -> Tensor:
    """How much of the returns' variance the values foretell: 1 − var(R − V) / var(R); 0 where the returns do not vary.

    1 is a perfect value model, 0 one that knows no more than the mean, below 0 one that misleads. Rank 0.
    """
    spread = returns_N.detach().var(correction=0)
    left = (returns_N - values_N).detach().var(correction=0)
    return torch.where(spread > 0, 1 - left / spread.clamp(min=1e-30), torch.zeros_like(spread))


def _rows(values_N: Tensor, sequence_N: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
    """A row for each sequence, zeros behind, L the longest; and the place of each token in the flattened rows."""
    assert values_N.ndim == 1, f"rank {values_N.ndim}, not 1"
    assert values_N.shape == sequence_N.shape, f"{values_N.shape} values for {sequence_N.shape} tokens"
    order_N = torch.argsort(sequence_N, stable=True)
    lengths_S = torch.bincount(sequence_N, minlength=num_sequences)
    starts_S = lengths_S.cumsum(0) - lengths_S
    width = int(lengths_S.max()) if len(values_N) else 0
    rank_N = torch.empty_like(order_N)
    rank_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    place_N = sequence_N * width + rank_N - starts_S[sequence_N]
    rows = values_N.new_zeros(num_sequences * width)
    rows[place_N] = values_N
    return rows.view(num_sequences, width), place_N
