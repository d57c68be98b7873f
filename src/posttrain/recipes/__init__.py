"""recipes: the corridors between the rooms. Each is one page, the whole loop in sight. May import every room below.

A recipe's module loads torch; `BUILT_IN` names them without loading any.
"""

BUILT_IN: dict[str, tuple[str, str]] = {
    "pretrain": (
        "posttrain.recipes.pretrain",
        "Make a base model: train a tokenizer and a decoder on text, or go on with one.",
    ),
    "sft": ("posttrain.recipes.sft", "Supervised fine-tuning on prompts and completions."),
    "reward_model": ("posttrain.recipes.reward_model", "Train a reward model on preferences."),
    "process_reward": (
        "posttrain.recipes.process_reward",
        "Train a process reward model on answers in labelled steps.",
    ),
    "dpo": (
        "posttrain.recipes.dpo",
        "Preference optimisation on pairs: DPO, IPO, SimPO, ORPO and others.",
    ),
    "kto": (
        "posttrain.recipes.kto",
        "Preference optimisation on single answers labelled good or bad: KTO, BCO.",
    ),
    "online_dpo": (
        "posttrain.recipes.online_dpo",
        "Preference optimisation on the policy's own answers, ranked by a grader, in rounds.",
    ),
    "grpo": ("posttrain.recipes.grpo", "Reinforcement learning from a grader with group-relative advantages."),
    "agent_grpo": (
        "posttrain.recipes.agent_grpo",
        "Reinforcement learning of an agent over episodes of many turns.",
    ),
    "ppo": ("posttrain.recipes.ppo", "Reinforcement learning from a grader with a value model (PPO)."),
    "distill": ("posttrain.recipes.distill", "Distillation: imitate a teacher's answers or its probabilities."),
    "on_policy_distill": (
        "posttrain.recipes.on_policy_distill",
        "On-policy distillation: the student samples, a teacher judges every token.",
    ),
    "rejection_sampling": (
        "posttrain.recipes.rejection_sampling",
        "Rejection sampling: imitate the model's own best answers; with rounds, expert iteration.",
    ),
    "merge": ("posttrain.recipes.merge", "Merge models of one architecture and vocabulary into one."),
    "evaluate": ("posttrain.recipes.evaluate", "Evaluate a model on a file of tasks, with intervals."),
    "judge_calibration": (
        "posttrain.recipes.judge_calibration",
        "Compare a judge with people's labels: agreement beyond chance, position, length, right and wrong.",
    ),
    "tulu3": (
        "posttrain.recipes.tulu3",
        "Tülu 3: SFT, on-policy preferences with length-normalised DPO, RL with verifiable rewards; dev and unseen.",
    ),
    "llama3_rounds": (
        "posttrain.recipes.llama3_rounds",
        "Llama 3's rounds: reward model, rejection sampling, SFT, DPO, average of models; "
        "win rate of each over the last.",
    ),
    "r1_zero": (
        "posttrain.recipes.r1_zero",
        "R1-Zero: GRPO on a base model with rule rewards for accuracy and form; "
        "optionally imitation of its best answers.",
    ),
    "flywheel": (
        "posttrain.recipes.flywheel",
        "The whole circle on a laptop: a text-to-SQL assistant from nothing, promoted, served, and tuned on its users.",
    ),
}

__all__ = ["BUILT_IN"]
