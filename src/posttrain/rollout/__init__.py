"""rollout: has the policy do the tasks.

Takes Task and a sampler (core.SampleTokens), gives Group of Trajectory, and with advantages Example. May import core.

    schedule = rollout.PromptSchedule(tasks, seed=0, prompts_per_step=8)
    groups = await rollout.run_groups(sampler, schedule.tasks_at(step), sampling, prompt_tokens=…, seed=0, step=step)
    rollout.check_failures(groups)
    examples = rollout.to_examples(groups, advantages)
"""

from posttrain.rollout.curriculum import Draw, PassRateCurriculum, PromptSource, PromptStream
from posttrain.rollout.examples import example_metrics, to_examples
from posttrain.rollout.group import Group, check_failures
from posttrain.rollout.resampling import Filled, Rolled, fill_batch, has_variance, pass_rate
from posttrain.rollout.rollout_metrics import rollout_metrics
from posttrain.rollout.schedule import PromptSchedule
from posttrain.rollout.single_turn import SingleTurn, run_groups

__all__ = [
    "Draw",
    "Filled",
    "Group",
    "PassRateCurriculum",
    "PromptSchedule",
    "PromptSource",
    "PromptStream",
    "Rolled",
    "SingleTurn",
    "check_failures",
    "example_metrics",
    "fill_batch",
    "has_variance",
    "pass_rate",
    "rollout_metrics",
    "run_groups",
    "to_examples",
]
