"""objectives: pure mathematics from tensors to a loss.

Takes tensors (logprobs, advantages, rewards) and an explicit denominator; gives a loss and metrics, or advantages.
May import: torch, and nothing of ours. A function here has no state, no configuration and no notion of a batch, a
trainer or a rank: what is averaged over is an argument, so accumulation, packing and sharding change nothing.
"""

from posttrain.objectives.advantages import group_advantages, leave_one_out
from posttrain.objectives.divergence import KlEstimator, entropy, kl_estimate
from posttrain.objectives.metric import Metric, combine, maximum, mean, minimum, total
from posttrain.objectives.nll import nll
from posttrain.objectives.policy import importance_weights, policy_surrogate, sampling_metrics
from posttrain.objectives.segments import sequence_lengths, sequence_mean, sequence_sum, sequence_weights

__all__ = [
    "KlEstimator",
    "Metric",
    "combine",
    "entropy",
    "group_advantages",
    "importance_weights",
    "kl_estimate",
    "leave_one_out",
    "maximum",
    "mean",
    "minimum",
    "nll",
    "policy_surrogate",
    "sampling_metrics",
    "sequence_lengths",
    "sequence_mean",
    "sequence_sum",
    "sequence_weights",
    "total",
]
