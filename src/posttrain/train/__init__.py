"""train: Example → Checkpoint.

Takes examples (token sequences with masks, columns and scalars), a decoder, and an objective; gives optimiser steps
with their metrics, logprobs, and checkpoints from which a killed run goes on bit for bit. May import: core, models,
objectives, registry, torch. Knows no algorithm: credit is assigned before it, the loss is an argument.
"""

from posttrain.train.batch import Batch, Denominators
from posttrain.train.checkpoint import Resumed, list_checkpoints, load_latest, read_state, save_checkpoint, verify
from posttrain.train.config import TrainConfig
from posttrain.train.distillation import TopK, distillation_objective, teacher_forward, top_k_columns, top_k_forward
from posttrain.train.forward import (
    Forward,
    Pass,
    Scores,
    hidden_states,
    score_forward,
    states_at,
    token_forward,
    value_forward,
)
from posttrain.train.ledger import Ledger
from posttrain.train.losses import (
    Normalise,
    Objective,
    Surrogate,
    column,
    nll_objective,
    normalisation,
    policy_objective,
)
from posttrain.train.neftune import noisy_embeddings
from posttrain.train.packing import pack
from posttrain.train.preference import (
    AnswerLoss,
    NllNormalise,
    PairLoss,
    PairWeights,
    answer_ratios,
    label_objective,
    pairs_of,
    preference_objective,
    with_step_scalars,
)
from posttrain.train.preference_forward import CollisionStats, collision_forward
from posttrain.train.ranks import Alone, Ranks, Together
from posttrain.train.reward_losses import outcome_objective, process_objective, reward_objective
from posttrain.train.state import TrainerState
from posttrain.train.supervised_losses import SupervisedNormalise, supervised_objective
from posttrain.train.trainer import TIMING_METRICS, Trainer
from posttrain.train.value_losses import value_objective

__all__ = [
    "TIMING_METRICS",
    "Alone",
    "AnswerLoss",
    "Batch",
    "CollisionStats",
    "Denominators",
    "Forward",
    "Ledger",
    "NllNormalise",
    "Normalise",
    "Objective",
    "PairLoss",
    "PairWeights",
    "Pass",
    "Ranks",
    "Resumed",
    "Scores",
    "SupervisedNormalise",
    "Surrogate",
    "Together",
    "TopK",
    "TrainConfig",
    "Trainer",
    "TrainerState",
    "answer_ratios",
    "collision_forward",
    "column",
    "distillation_objective",
    "hidden_states",
    "label_objective",
    "list_checkpoints",
    "load_latest",
    "nll_objective",
    "noisy_embeddings",
    "normalisation",
    "outcome_objective",
    "pack",
    "pairs_of",
    "policy_objective",
    "preference_objective",
    "process_objective",
    "read_state",
    "reward_objective",
    "save_checkpoint",
    "score_forward",
    "states_at",
    "supervised_objective",
    "teacher_forward",
    "token_forward",
    "top_k_columns",
    "top_k_forward",
    "value_forward",
    "value_objective",
    "verify",
    "with_step_scalars",
]
