"""objectives: pure mathematics from tensors to a loss.

Takes tensors (logprobs, advantages, rewards) and an explicit denominator; gives a loss and metrics, or advantages.
May import: torch, and nothing of ours. A function here has no state, no configuration and no notion of a batch, a
trainer or a rank: what is averaged over is an argument, so accumulation, packing and sharding change nothing.
"""

from posttrain.objectives.advantages import group_advantages, leave_one_out
from posttrain.objectives.advantages_batch import (
    batch_scaled_advantages,
    decoupled_advantages,
    max_rl_advantages,
    reinforce_advantages,
    reinforce_pp_advantages,
)
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
from posttrain.objectives.gae import discounted_returns, explained_variance, gae, whiten
from posttrain.objectives.metric import Metric, combine, maximum, mean, minimum, total
from posttrain.objectives.nll import nll
from posttrain.objectives.over_long import missing_eos_penalty, over_long_penalty
from posttrain.objectives.policy import RatioLevel, importance_weights, policy_ratio, policy_surrogate, sampling_metrics
from posttrain.objectives.policy_entropy import (
    active_entropy_coef,
    adapt_entropy_coef,
    entropy_bonus,
    high_entropy_mask,
)
from posttrain.objectives.policy_rewards import adapt_kl_coef, last_tokens, token_rewards
from posttrain.objectives.policy_variants import (
    cispo_surrogate,
    kl_penalty,
    reinforce_surrogate,
    sapo_surrogate,
    vespo_surrogate,
)
from posttrain.objectives.policy_weights import (
    Bound,
    WeightLevel,
    bounded_importance_weights,
    stale_sequence_mask,
    stale_version_mask,
)
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
from posttrain.objectives.preference_unpaired import (
    apo_zero_unpaired,
    bco,
    bco_running_shift,
    bco_shift,
    kl_baseline,
    kto,
)
from posttrain.objectives.reward_model import bradley_terry, plackett_luce, ranked_pairs
from posttrain.objectives.reward_model_ensemble import Ensemble, ensemble_reward
from posttrain.objectives.reward_model_labels import outcome_loss, process_loss
from posttrain.objectives.segments import sequence_lengths, sequence_mean, sequence_sum, sequence_weights
from posttrain.objectives.value import value_loss

__all__ = [
    "Bound",
    "Divergence",
    "Ensemble",
    "KlEstimator",
    "Metric",
    "Pairs",
    "RatioLevel",
    "TopKRest",
    "WeightLevel",
    "active_entropy_coef",
    "adapt_entropy_coef",
    "adapt_kl_coef",
    "aot_losses",
    "aot_unpaired_losses",
    "apo_down_losses",
    "apo_zero_losses",
    "apo_zero_unpaired",
    "batch_scaled_advantages",
    "bco",
    "bco_pair_losses",
    "bco_running_shift",
    "bco_shift",
    "bounded_importance_weights",
    "bradley_terry",
    "cispo_surrogate",
    "combine",
    "decoupled_advantages",
    "discopop_losses",
    "discounted_returns",
    "distillation",
    "dpo_losses",
    "ensemble_reward",
    "entropy",
    "entropy_bonus",
    "exo_losses",
    "explained_variance",
    "f_divergence",
    "forward_kl",
    "gae",
    "generalised_jsd",
    "group_advantages",
    "high_entropy_mask",
    "hinge_losses",
    "importance_weights",
    "ipo_losses",
    "kl_baseline",
    "kl_estimate",
    "kl_penalty",
    "kto",
    "last_tokens",
    "leave_one_out",
    "max_rl_advantages",
    "maximum",
    "mean",
    "minimum",
    "missing_eos_penalty",
    "nca_losses",
    "nll",
    "nll_losses",
    "orpo_log_odds",
    "orpo_losses",
    "outcome_loss",
    "over_long_penalty",
    "plackett_luce",
    "policy_ratio",
    "policy_surrogate",
    "preference_loss",
    "process_loss",
    "ranked_pairs",
    "reinforce_advantages",
    "reinforce_pp_advantages",
    "reinforce_surrogate",
    "reverse_kl",
    "robust_losses",
    "sampling_metrics",
    "sapo_surrogate",
    "sequence_lengths",
    "sequence_mean",
    "sequence_sum",
    "sequence_weights",
    "simpo_losses",
    "sppo_losses",
    "stale_sequence_mask",
    "stale_version_mask",
    "teacher_advantages",
    "token_rewards",
    "top_k_divergence",
    "total",
    "value_loss",
    "vespo_surrogate",
    "whiten",
    "wpo_weights",
]
