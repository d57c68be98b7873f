"""Multi-turn GRPO: credit by hand, environments by word, resuming to the same weights, an agent that learns."""

from __future__ import annotations

import asyncio
import importlib.util
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.core import (
    ConfigError,
    Example,
    Grade,
    Message,
    StepResult,
    StopReason,
    Task,
    TokenSequence,
    Trajectory,
    UsageError,
    assistant,
    generator,
    read_metrics,
    user,
)
from posttrain.recipes.agent_credit import returns_to_go, token_advantages, turn_advantages
from posttrain.recipes.agent_grpo import agent_grpo
from posttrain.recipes.agent_loop import Agent, agent_loop, evaluate_episodes, stage_of
from posttrain.recipes.environments import environment_from, tasks_from
from posttrain.recipes.policy import Policy, load_policy
from posttrain.recipes.pretrain import new_policy
from posttrain.recipes.rl_settings import Grpo
from posttrain.recipes.workbench import Workbench, open_workbench
from posttrain.rollout import EpisodeLimits, EpisodeReward, Group, GuessNumber, Hangman, Rolled
from posttrain.train import Ledger, TrainConfig, Trainer, list_checkpoints, nll_objective, read_state

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TASKS = [Task(id=f"guess-{number}", prompt="", facts={"number": number}) for number in range(1, 7)]
GAME = "Guess my number from 1 to 10. Higher. Lower. Say a number. user assistant "


@pytest.fixture(scope="module")
def guesser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has seen the game played at random: it says numbers and ends its turns."""
    path = tmp_path_factory.mktemp("guesser") / "model"
    shape = {"vocab_size": 300, "width": 32, "num_layers": 1, "num_heads": 2, "max_positions": 160}
    policy = new_policy([GAME * 4], **shape, seed=0, path=path)
    random = generator(0, "games")
    games = []
    for _ in range(64):
        told = [user("Guess my number from 1 to 10.")]
        for _ in range(3):
            told += [assistant(str(random.randint(1, 10))), user(random.choice(["Higher.", "Lower."]))]
        games.append(told)
    examples = [
        Example(id=str(place), sequences=(TokenSequence(tokens=each.tokens, mask=each.mask),))
        for place, each in enumerate(policy.renderer.render_many(games))
    ]
    trainer = Trainer(policy.model, TrainConfig(lr=1e-2, total_steps=60, dtype="float32"), nll_objective)
    for step in range(60):
        trainer.step([examples[(8 * step + place) % 64] for place in range(8)])
    return policy.save(path)


def settings(**changes: Any) -> Grpo:
    values = {"steps": 4, "prompts_per_step": 3, "group_size": 3, "max_tokens": 150, "lr": 1e-2, "dtype": "float32"}
    return Grpo.from_dict({**values, "checkpoint_every": 2, **changes})


AGENT = Agent(turn_tokens=6, limits=EpisodeLimits(max_turns=3, max_tokens=150))


# Credit


def test_returns_by_hand() -> None:
    assert returns_to_go([1.0, 0.0, 2.0]) == [3.0, 2.0, 2.0]
    assert returns_to_go([1.0, 0.0, 2.0], 0.5) == [1.5, 1.0, 2.0]
    assert returns_to_go([]) == []


def test_turn_advantages_by_hand() -> None:
    # Returns: [1, 1], [0], [2, 0, 0]. Means: 1, 0.5, and one alone.
    found = turn_advantages([[0.0, 1.0], [0.0], [2.0, 0.0, 0.0]])
    assert found == [[0.0, 0.5], [-1.0], [1.0, -0.5, 0.0]]
    assert turn_advantages([[1.0], [0.0], [0.5]]) == [[0.5], [-0.5], [0.0]], "one turn: GRPO without the deviation"


def played(index: int, rewards: list[float], failed: bool = False) -> Trajectory:
    """Two tokens of context before each turn of two tokens."""
    mask = (False, False, True, True) * len(rewards)
    zeros = (0.0,) * len(mask)
    return Trajectory(
        id=f"a/0/{index}",
        task=TASKS[0],
        tokens=tuple(range(len(mask))),
        mask=mask,
        logprobs=zeros,
        policy_logprobs=zeros,
        text="",
        stop_reason=StopReason.ERROR if failed else StopReason.EOS,
        error="lost" if failed else None,
        group="a/0",
        index=index,
        metrics={"reward": sum(rewards), **{f"turn/{turn}/reward": value for turn, value in enumerate(rewards)}},
    )


def test_every_token_of_a_turn_has_its_advantage() -> None:
    trajectories = (played(0, [0.0, 1.0]), played(1, [0.0]), played(2, [0.0], failed=True))
    grades = [
        Grade(score=1.0, grader="g"),
        Grade(score=-1.0, grader="g"),  # a grader that takes 1 off: that is the last turn's
        Grade(score=None, grader="g", error="lost"),
    ]
    ((one, two, three),) = token_advantages([Rolled(Group(task=TASKS[0], trajectories=trajectories), grades)])
    assert one == [0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0], "the second turn has nobody to compare with"
    assert two == [0.0, 0.0, -1.0, -1.0]
    assert three is None


# Environments by word


def test_environments_by_word(tmp_path: Path) -> None:
    assert environment_from("guess") is GuessNumber
    assert environment_from("hangman") is Hangman
    file = tmp_path / "mine.py"
    file.write_text(
        "from posttrain.core import Task\nfrom posttrain.rollout import GuessNumber\n"
        "class Mine(GuessNumber): pass\nclass Needy:\n    def __init__(self, what): pass\n"
        "def tasks():\n    return [Task(id=str(n), prompt='') for n in range(5)]\n",
        encoding="utf-8",
    )
    assert type(environment_from(f"{file}:Mine")()).__name__ == "Mine"
    assert [task.id for task in tasks_from(f"{file}:Mine", None, limit=2)] == ["0", "1"]
    for wrong, why in [
        ("chess", "give guess, hangman"),
        ("sql:none.db", "no such database"),
        (f"{tmp_path}/none.py:X", "no such file"),
        (f"{file}:Other", "no class or function 'Other'"),
        (f"{file}:Needy", "needs what"),
    ]:
        with pytest.raises(UsageError, match=why):
            environment_from(wrong)
    with pytest.raises(UsageError, match="brings no tasks"):
        tasks_from("guess", None)


def test_a_database_by_word(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    with sqlite3.connect(path) as connection:
        connection.executescript("CREATE TABLE item (name TEXT); INSERT INTO item VALUES ('tea'), ('mug');")
    connection.close()

    async def reward(task: Task, sql: str | None, answer: str) -> float:
        from posttrain.core import Message, ToolCall, assistant

        environment = environment_from(f"sql:{path}")()
        await environment.reset(task)
        if sql is not None:
            call = ToolCall(name="query", arguments={"sql": sql}, id="call00000")
            await environment.step(Message(role="assistant", tool_calls=(call,)))
        result = await environment.step(assistant(answer))
        await environment.close()
        return result.reward

    task = Task(id="count", prompt="How many?", answer="SELECT count(*) FROM item")
    assert asyncio.run(reward(task, "SELECT 2", "done")) == 1.0
    assert asyncio.run(reward(task, "SELECT 3", "done")) == 0.0
    assert asyncio.run(reward(task, None, "done")) == 0.0
    assert asyncio.run(reward(task.replace(answer="2"), None, " 2 ")) == 1.0


# The loop


def run(bench: Workbench, policy: Policy, config: Grpo, agent: Agent = AGENT, **options: Any) -> dict[str, float]:
    factory = options.pop("factory", GuessNumber)
    return asyncio.run(agent_loop(bench, policy, TASKS, factory, EpisodeReward(), config, agent, **options))


class Near(GuessNumber):
    """Every turn is worth more the nearer it comes."""

    async def step(self, action: Message) -> StepResult:
        result = await super().step(action)
        digits = "".join(character for character in action.content if character.isdigit())[:2]
        return result.replace(reward=result.reward + (1.0 - abs(int(digits) - self._number) / 10 if digits else 0.0))


class Killed(BaseException):
    """What no part of the house catches, as it does not catch a signal."""


def killed() -> GuessNumber:
    raise Killed


@pytest.mark.parametrize("credit", ["episode", "turn"])
def test_a_loop_that_was_broken_off_comes_to_the_same_weights(tmp_path: Path, guesser: Path, credit: str) -> None:
    agent = AGENT.replace(credit=credit)
    whole, parts, again = (load_policy(str(guesser)) for _ in range(3))
    with open_workbench("toy", {}, runs=tmp_path / "whole") as bench:
        last = run(bench, whole, settings(), agent, factory=Near)
        rows = read_metrics(bench.run.path / "metrics.jsonl")
    made = iter(range(9 * 3 + 4))  # the fourth episode of the fourth step kills it
    with (
        pytest.raises(Killed),
        open_workbench("toy", {}, runs=tmp_path / "parts") as bench,
    ):
        run(bench, parts, settings(), agent, factory=lambda: killed() if next(made, None) is None else Near())
    (folder,) = (path for path in (tmp_path / "parts").iterdir() if path.is_dir())
    with open_workbench("toy", {}, runs=tmp_path / "parts", resume=folder) as bench:
        resumed = run(bench, again, settings(), agent, factory=Near)
        ledger = Ledger()
        ledger.restore(read_state(list_checkpoints(bench.run.checkpoints)[0])[1]["ledger"])
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert resumed["reward"] == last["reward"]
    assert resumed["num_tokens"] == last["num_tokens"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert sorted(ledger.trained(epoch=0)) == sorted(task.id for task in TASKS)
    assert all(row["grad_norm"] > 0 for row in rows)
    for name in ("episodes/mean_turns", "tools/call_frequency", "episodes/clipped_ratio", "reward", "entropy"):
        assert name in rows[0]


def test_kept_prefixes_save_reading_and_change_no_token(guesser: Path) -> None:
    read, tokens = {}, {}
    for keep in (True, False):
        agent = AGENT.replace(keep_prefixes=keep)
        stage = stage_of(load_policy(str(guesser)), GuessNumber, EpisodeReward(), settings(), agent)
        with stage.engine:
            rolled = asyncio.run(stage.play(TASKS, siblings=4, temperature=1.0, seed=0, step=0, max_failed=0.0))
            read[keep] = stage.engine.stats().prefill_tokens_total
        tokens[keep] = [t.tokens for one in rolled for t in one.group.trajectories]
    assert tokens[True] == tokens[False]
    assert read[True] < 0.6 * read[False], "a turn reads what is new, and at most 15 tokens twice"


def test_hundreds_of_episodes_are_under_way_at_once_over_one_engine(guesser: Path) -> None:
    under_way: list[int] = [0]
    most: list[int] = [0]

    class Counted(GuessNumber):
        async def reset(self, task: Task) -> list[Message]:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
            return list(await super().reset(task))

        async def close(self) -> None:
            under_way[0] -= 1
            await super().close()

    tasks = [Task(id=f"guess-{place}", prompt="", facts={"number": place % 10 + 1}) for place in range(30)]
    config = settings(prompts_per_step=30, group_size=8)
    stage = stage_of(load_policy(str(guesser)), Counted, EpisodeReward(), config, AGENT)
    with stage.engine:
        rolled = asyncio.run(stage.play(tasks, siblings=8, temperature=1.0, seed=0, step=0, max_failed=0.0))
    trajectories = [trajectory for one in rolled for trajectory in one.group.trajectories]
    assert len(trajectories) == most[0] == 240
    assert under_way[0] == 0
    assert max(trajectory.metrics["turns"] for trajectory in trajectories) == 3


def test_the_sampler_and_the_trainer_agree_on_every_turn(bench: Workbench, guesser: Path) -> None:
    metrics = run(bench, load_policy(str(guesser)), settings(steps=1))
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4
    assert metrics["episodes/mean_turns"] > 1


def test_evaluation_counts_successes(bench: Workbench, guesser: Path) -> None:
    metrics = run(bench, load_policy(str(guesser)), settings(steps=2, evaluate_every=2), held_out=TASKS)
    assert metrics["eval/success_low"] <= metrics["eval/success"] <= metrics["eval/success_high"]
    stage = stage_of(load_policy(str(guesser)), GuessNumber, EpisodeReward(), settings(), AGENT)
    with stage.engine:
        found = asyncio.run(evaluate_episodes(stage, TASKS))
    assert found["eval/turns"] <= 3


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="credit"):
        Agent.from_dict({"credit": "token"})


# As a user runs it


def test_the_recipe_runs_and_resumes_from_words(tmp_path: Path, guesser: Path) -> None:
    file = tmp_path / "game.py"
    file.write_text(
        "from posttrain.core import Task\nfrom posttrain.rollout import GuessNumber as Game\n"
        "def tasks():\n    return [Task(id=str(n), prompt='', facts={'number': n}) for n in range(1, 9)]\n",
        encoding="utf-8",
    )
    words: dict[str, Any] = {"model": str(guesser), "environment": f"{file}:Game", "held_out": 2, "steps": 2}
    words |= {"prompts_per_step": 2, "group_size": 2, "turn_tokens": 4, "max_context": 150, "lr": 1e-3}
    words |= {"dtype": "float32", "evaluate_every": 1, "runs": tmp_path / "runs"}
    folder = agent_grpo.run_with(words)
    assert (folder / "model" / "model.safetensors").is_file()
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert "eval/success" in rows[-1]
    assert agent_grpo.run_with({**words, "resume": folder}) == folder


@pytest.mark.slow
def test_the_example_learns_to_look(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("tool_agent", EXAMPLES / "tool_agent" / "tool_agent.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.tool_agent(runs=tmp_path, grpo_steps=25, held_out=100)
    assert found["before"] < 0.6
    assert found["after_low"] > found["before"], "the interval after it lies above the share before it"


@pytest.mark.slow
def test_the_sql_agent_fits_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of a few steps on the real databases: SFT, both kinds of RL, every measurement."""
    source = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "text_to_sql" / "defog"
    if not source.exists():
        pytest.skip(f"no databases at {source}")
    monkeypatch.syspath_prepend(str(EXAMPLES / "sql_agent"))
    module = importlib.import_module("sql_agent")
    found = module.sql_agent(data=source, small=True, runs=tmp_path)
    assert {"before", "before_single", "after", "after_single", "people", "after_low"} <= set(found)
    assert all(0.0 <= value <= 1.0 for value in found.values())
    logs = [path.read_text(encoding="utf-8") for path in tmp_path.glob("*/events.log")]  # the run's and its stages'
    assert sum("271 by people" in log for log in logs) == 1
