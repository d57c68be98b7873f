"""recipes: the corridors between the rooms. Each is one page, the whole loop in sight. May import every room below.

A recipe's module loads torch; `BUILT_IN` names them without loading any.
"""

BUILT_IN: dict[str, tuple[str, str]] = {
    "pretrain": (
        "posttrain.recipes.pretrain",
        "Make a base model: train a tokenizer and a decoder on text, or go on with one.",
    ),
    "sft": ("posttrain.recipes.sft", "Supervised fine-tuning on prompts and completions."),
    "grpo": ("posttrain.recipes.grpo", "Reinforcement learning from a grader with group-relative advantages."),
    "evaluate": ("posttrain.recipes.evaluate", "Evaluate a model on a file of tasks, with intervals."),
    "flywheel": (
        "posttrain.recipes.flywheel",
        "The whole circle on a laptop: a text-to-SQL assistant from nothing, promoted, served, and tuned on its users.",
    ),
}

__all__ = ["BUILT_IN"]
