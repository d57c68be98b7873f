"""Settings of the recipes that follow a paper: what was published, by size of model, and what small models want.

Every value of a published size is from the source that stands beside it, unless it is marked as ours. `tiny` is ours
altogether: decoders of some hundred thousand to a few million parameters that were made from nothing, which want
learning rates a hundred times larger. Whatever the command line gives outweighs a setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Tülu 3, arXiv 2411.15124, as the commands of open-instruct have it (docs/tulu3.md); GRPO is Tülu 3.1 8B's.
_TULU3_8B: dict[str, Any] = {
    "sft_lr": (5e-6,),
    "sft_epochs": 2.0,
    "sft_batch": 128,
    "sft_length": 4096,
    "dpo_lr": (5e-7,),
    "dpo_beta": 5.0,
    "dpo_batch": 128,
    "pair_length": 2048,
    "rm_lr": 3e-6,
    "rm_epochs": 1.0,
    "rm_batch": 256,
    "reward": 10.0,  # of a right answer; one that does not end costs as much
    "max_tokens": 2048,
    "ppo_lr": (3e-7,),
    "ppo_beta": 0.05,
    "ppo_prompts": 224,
    "ppo_steps": 448,  # ours: 100,352 answers; theirs ran until dev chose a checkpoint
    "ppo_warmup": 0.0,
    "grpo_lr": (5e-7,),
    "grpo_beta": 0.01,
    "grpo_prompts": 48,
    "grpo_group": 16,
    "grpo_minibatches": 2,
    "grpo_steps": 1000,  # ours, likewise
}
TULU3: dict[str, dict[str, Any]] = {
    "8b": _TULU3_8B,
    "70b": _TULU3_8B
    | {"sft_lr": (2e-6,), "dpo_lr": (2e-7,), "ppo_lr": (1e-7,), "ppo_beta": 0.07, "ppo_prompts": 640}
    | {"ppo_steps": 625, "ppo_warmup": 0.1},  # 400,000 answers
    "tiny": _TULU3_8B
    | {"sft_lr": (5e-4,), "sft_batch": 32, "dpo_lr": (1e-4,), "dpo_batch": 32, "rm_lr": 1e-3, "rm_batch": 32}
    | {"ppo_lr": (1e-4,), "ppo_prompts": 128, "ppo_steps": 30}
    | {"grpo_lr": (3e-4,), "grpo_prompts": 24, "grpo_group": 8, "grpo_minibatches": 1, "grpo_steps": 40}
    | {"rm_epochs": 3.0, "max_tokens": 96},
}

# Llama 3, arXiv 2407.21783, sections 4.1 and 4.2.
_LLAMA3: dict[str, Any] = {
    "rounds": 6,  # 4.1.6
    "sft_lr": 1e-5,  # 4.1.3, of the largest models, over 8,500 to 9,000 steps
    "dpo_lr": 1e-5,  # 4.1.4, with beta 0.1 and nll_coef 0.2
    "dpo_beta": 0.1,
    "nll_coef": 0.2,
    "samples": 10,  # 4.2.2: 10 to 30
    "sft_epochs": 2.0,  # ours, and all below: not published
    "sft_batch": 128,
    "dpo_batch": 128,
    "rm_lr": 3e-6,  # Tülu 3's, as is the one epoch
    "rm_epochs": 1.0,
    "rm_batch": 64,
    "averaged": 2,
    "max_length": 4096,
    "max_tokens": 1024,
}
LLAMA3: dict[str, dict[str, Any]] = {
    "published": _LLAMA3,
    "tiny": _LLAMA3
    | {"rounds": 2, "sft_lr": 5e-4, "dpo_lr": 1e-4, "sft_batch": 32, "dpo_batch": 32, "rm_lr": 1e-3, "rm_batch": 32}
    | {"rm_epochs": 3.0, "max_tokens": 96},
}

# DeepSeek-R1, arXiv 2501.12948, and Nature 645 (2025), 633-638, Methods, "Training details of DeepSeek-R1-Zero".
_R1: dict[str, Any] = {
    "lr": 3e-6,
    "beta": 0.001,
    "group_size": 16,
    "prompts_per_step": 512,  # 8,192 answers a rollout,
    "minibatches": 16,  # in 16 minibatches of 32 questions
    "steps": 650,  # 10,400 updates
    "reference_every": 25,  # 400 updates
    "clip": 10.0,  # of the first RL stage of R1; R1-Zero's is not given
    "max_tokens": 32768,  # 65,536 from update 8,200 on
    "sft_epochs": 2.0,  # 800,000 answers, two epochs (v1, section 2.3.3)
    "sft_batch": 128,  # ours
    "sft_lr": 1e-5,  # ours
    "samples": 8,  # ours
}
R1: dict[str, dict[str, Any]] = {
    "published": _R1,
    "tiny": _R1
    | {"lr": 3e-4, "group_size": 8, "prompts_per_step": 24, "minibatches": 1, "steps": 60, "reference_every": 20}
    | {"clip": 0.2, "max_tokens": 96, "sft_lr": 5e-4, "sft_batch": 32},
}


def settings_of(sizes: Mapping[str, Mapping[str, Any]], options: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's options, those that are not given (None, or none of several) as the size has them.

    Args:
        sizes: settings by size.
        options: of the recipe; `size` says which settings to begin with.
    """
    settings = dict(sizes[options["size"]])
    return {**options, **settings, **{name: value for name, value in options.items() if value not in (None, ())}}
