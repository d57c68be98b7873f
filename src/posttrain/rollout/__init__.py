"""rollout: has the policy do the tasks.

Takes Task and a sampler (core.SampleTokens), gives Group of Trajectory, and with advantages Example. May import core
and render.

    schedule = rollout.PromptSchedule(tasks, seed=0, prompts_per_step=8)
    groups = await rollout.run_groups(sampler, schedule.tasks_at(step), sampling, prompt_tokens=…, seed=0, step=step)
    rollout.check_failures(groups)
    examples = rollout.to_examples(groups, advantages)

Episodes of several turns, with tools, databases, users or other players, give the same groups:

    turns = rollout.TurnTokens(renderer)
    groups = await rollout.run_episodes(sampler, tasks, MyEnvironment, sampling, turns=turns, seed=0, step=step)
"""

from posttrain.rollout.curriculum import Draw, PassRateCurriculum, PromptSource, PromptStream
from posttrain.rollout.environment import (
    EnvironmentFactory,
    EpisodeLimits,
    EpisodeReward,
    OffersTools,
    TakesSeed,
    per_turn,
    turn_rewards,
    turn_spans,
)
from posttrain.rollout.environment_tools import ToolEnvironment
from posttrain.rollout.episodes import episode_metrics, run_episodes
from posttrain.rollout.examples import example_metrics, to_examples
from posttrain.rollout.group import Group, check_failures
from posttrain.rollout.lockstep import Lockstep, parked
from posttrain.rollout.resampling import Filled, Rolled, fill_batch, has_variance, pass_rate
from posttrain.rollout.rollout_metrics import rollout_metrics
from posttrain.rollout.schedule import PromptSchedule
from posttrain.rollout.single_turn import SingleTurn, run_groups
from posttrain.rollout.text_game import GuessNumber, Hangman
from posttrain.rollout.tools import FunctionTool, Tool, ToolAnswer, Toolbox
from posttrain.rollout.turn_tokens import TurnTokens

__all__ = [
    "Draw",
    "EnvironmentFactory",
    "EpisodeLimits",
    "EpisodeReward",
    "Filled",
    "FunctionTool",
    "Group",
    "GuessNumber",
    "Hangman",
    "Lockstep",
    "OffersTools",
    "PassRateCurriculum",
    "PromptSchedule",
    "PromptSource",
    "PromptStream",
    "Rolled",
    "SingleTurn",
    "TakesSeed",
    "Tool",
    "ToolAnswer",
    "ToolEnvironment",
    "Toolbox",
    "TurnTokens",
    "check_failures",
    "episode_metrics",
    "example_metrics",
    "fill_batch",
    "has_variance",
    "parked",
    "pass_rate",
    "per_turn",
    "rollout_metrics",
    "run_episodes",
    "run_groups",
    "to_examples",
    "turn_rewards",
    "turn_spans",
]
