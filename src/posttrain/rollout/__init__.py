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
from posttrain.rollout.gym_environment import GymEnvironment, OpenEnvEnvironment
from posttrain.rollout.lockstep import Lockstep, Parked
from posttrain.rollout.mcp_client import McpError
from posttrain.rollout.mcp_tools import McpSession, McpTool, connect_http, connect_stdio
from posttrain.rollout.python_environment import PythonSession, python_environment
from posttrain.rollout.resampling import Filled, Rolled, fill_batch, has_variance, pass_rate
from posttrain.rollout.rollout_metrics import rollout_metrics
from posttrain.rollout.schedule import PromptSchedule
from posttrain.rollout.self_play import Game, Moved, run_self_play
from posttrain.rollout.simulated_user import SimulatedUser
from posttrain.rollout.single_turn import SingleTurn, run_groups
from posttrain.rollout.sql_environment import SqlTools, sql_environment
from posttrain.rollout.text_game import GuessNumber, Hangman
from posttrain.rollout.tools import FunctionTool, Tool, ToolAnswer, Toolbox, ToolError
from posttrain.rollout.turn_tokens import TurnTokens
from posttrain.rollout.verifiers_environment import VerifiersEnvironment, verifiers_tasks

__all__ = [
    "Draw",
    "EnvironmentFactory",
    "EpisodeLimits",
    "EpisodeReward",
    "Filled",
    "FunctionTool",
    "Game",
    "Group",
    "GuessNumber",
    "GymEnvironment",
    "Hangman",
    "Lockstep",
    "McpError",
    "McpSession",
    "McpTool",
    "Moved",
    "OffersTools",
    "OpenEnvEnvironment",
    "Parked",
    "PassRateCurriculum",
    "PromptSchedule",
    "PromptSource",
    "PromptStream",
    "PythonSession",
    "Rolled",
    "SimulatedUser",
    "SingleTurn",
    "SqlTools",
    "TakesSeed",
    "Tool",
    "ToolAnswer",
    "ToolEnvironment",
    "ToolError",
    "Toolbox",
    "TurnTokens",
    "VerifiersEnvironment",
    "check_failures",
    "connect_http",
    "connect_stdio",
    "episode_metrics",
    "example_metrics",
    "fill_batch",
    "has_variance",
    "pass_rate",
    "per_turn",
    "python_environment",
    "rollout_metrics",
    "run_episodes",
    "run_groups",
    "run_self_play",
    "sql_environment",
    "to_examples",
    "turn_rewards",
    "turn_spans",
    "verifiers_tasks",
]
