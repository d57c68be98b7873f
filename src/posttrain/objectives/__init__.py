"""objectives: pure mathematics from tensors to a loss.

Takes tensors (logprobs, advantages, rewards) and an explicit denominator; gives a loss and metrics, or advantages.
May import: torch, and nothing of ours. A function here has no state, no configuration and no notion of a batch, a
trainer or a rank: what is averaged over is an argument, so accumulation, packing and sharding change nothing.
"""

from posttrain.objectives.advantages import group_advantages, leave_one_out
from posttrain.objectives.distillation import (
    TopKRest,
    distillation,
    forward_kl,
    generalised_jsd,
    reverse_kl,
    teacher_advantages,
    top_k_divergence,
)
from posttrain.objectives.divergence import KlEstimator, entropy, kl_estimate
from posttrain.objectives.metric import Metric, combine, maximum, mean, minimum, total
from posttrain.objectives.nll import nll
from posttrain.objectives.policy import importance_weights, policy_surrogate, sampling_metrics
from posttrain.objectives.preference import Divergence, Pairs, f_divergence, preference_loss, wpo_weights
from posttrain.objectives.preference_losses import (
    aot_losses,
    aot_unpaired_losses,
    apo_down_losses,
    apo_zero_losses,
    bco_pair_losses,
    discopop_losses,
    dpo_losses,
    exo_losses,
    hinge_losses,
    ipo_losses,
    nca_losses,
    nll_losses,
    orpo_log_odds,
    orpo_losses,
    robust_losses,
    simpo_losses,
    sppo_losses,
)
from posttrain.objectives.preference_unpaired import apo_zero_unpaired, bco, bco_shift, kl_baseline, kto
from posttrain.objectives.segments import sequence_lengths, sequence_mean, sequence_sum, sequence_weights

__all__ = [
    "Divergence",
    "KlEstimator",
    "Metric",
    "Pairs",
    "TopKRest",
    "aot_losses",
    "aot_unpaired_losses",
    "apo_down_losses",
    "apo_zero_losses",
    "apo_zero_unpaired",
    "bco",
    "bco_pair_losses",
    "bco_shift",
    "combine",
    "discopop_losses",
    "distillation",
    "dpo_losses",
    "entropy",
    "exo_losses",
    "f_divergence",
    "forward_kl",
    "generalised_jsd",
    "group_advantages",
    "hinge_losses",
    "importance_weights",
    "ipo_losses",
    "kl_baseline",
    "kl_estimate",
    "kto",
    "leave_one_out",
    "maximum",
    "mean",
    "minimum",
    "nca_losses",
    "nll",
    "nll_losses",
    "orpo_log_odds",
    "orpo_losses",
    "policy_surrogate",
    "preference_loss",
    "reverse_kl",
    "robust_losses",
    "sampling_metrics",
    "sequence_lengths",
    "sequence_mean",
    "sequence_sum",
    "sequence_weights",
    "simpo_losses",
    "sppo_losses",
    "teacher_advantages",
    "top_k_divergence",
    "total",
    "wpo_weights",
]
