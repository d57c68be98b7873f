"""Environments of other houses: adapters by hand on small stand-ins, and on the real packages where they are."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from posttrain.core import MissingExtraError, Sampling, StepResult, Task, UsageError, assistant
from posttrain.engine import ScriptedEngine
from posttrain.render import CALL_SYNTAXES, Renderer, Tokenizer
from posttrain.rollout import (
    GymEnvironment,
    OpenEnvEnvironment,
    TurnTokens,
    VerifiersEnvironment,
    run_episodes,
    verifiers_tasks,
)

TOKENIZER = Tokenizer.train_bpe(["left right"], 280, ("<|im_end|>", "<|im_start|>"))


class Walk:
    """Gymnasium's form: walk from 0 to 3; a step costs 0.1, arriving is worth 1."""

    class Space:
        def contains(self, action: Any) -> bool:
            return action in (0, 1) and not isinstance(action, str)

        def __str__(self) -> str:
            return "Discrete(2)"

    action_space = Space()
    closed = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.at, self.seeded, self.num_steps = (options or {}).get("start", 0), seed, 0
        return self.at, {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.at += 1 if action == 1 else -1
        self.num_steps += 1
        return (
            self.at,
            (1.0 if self.at == 3 else 0.0) - 0.1,
            self.at == 3,
            self.num_steps == 5,
            {"at": self.at, "x": "y"},
        )

    def close(self) -> None:
        Walk.closed += 1


def play(environment: Any, *says: str, **facts: Any) -> tuple[Any, list[StepResult]]:
    async def run() -> tuple[Any, list[StepResult]]:
        if hasattr(environment, "seed"):
            environment.seed(2**40 + 5)
        opening = await environment.reset(Task(id="t", prompt="", facts=facts))
        results = [await environment.step(assistant(text)) for text in says]
        await environment.close()
        return opening, results

    return asyncio.run(run())


# Gymnasium


def test_a_walk_by_numbers() -> None:
    made = Walk()
    opening, results = play(GymEnvironment(lambda: made, rules="Walk to 3."), "I go 1", "1", "0", "1", "1")
    assert opening[0].content == "Walk to 3.\n0"
    assert made.seeded == (2**40 + 5) % 2**31
    assert [result.messages[0].content for result in results] == ["1", "2", "1", "2", "3"]
    assert [round(result.reward, 3) for result in results] == [-0.1, -0.1, -0.1, -0.1, 0.9]
    assert results[-1].done
    assert results[-1].info == {"at": 3.0, "truncated": 1}


def test_a_walk_by_words_and_what_is_no_action() -> None:
    actions = {"left": 0, "right": 1}
    environment = GymEnvironment(Walk, actions=actions, show=lambda at: f"You stand at {at}.", invalid_reward=-0.5)
    opening, results = play(environment, "To the right!", "up", "right.", gym={"start": 1})
    assert opening[0].content == "You stand at 1."
    assert [result.messages[0].content for result in results] == [
        "You stand at 2.",
        "That is no action. Actions: left, right",
        "You stand at 3.",
    ]
    assert (results[1].reward, results[1].info) == (-0.5, {"invalid_actions": 1})
    assert results[2].done


def test_episodes_of_it() -> None:
    says = iter("1111")
    (group,) = asyncio.run(
        run_episodes(
            ScriptedEngine(lambda request: next(says), TOKENIZER),
            [Task(id="walk", prompt="")],
            lambda: GymEnvironment(Walk),
            Sampling(max_tokens=10, n=1),
            turns=TurnTokens(Renderer(TOKENIZER)),
            seed=0,
        )
    )
    assert group.trajectories[0].metrics["reward"] == pytest.approx(0.7)
    assert group.trajectories[0].metrics["at"] == 6.0, "numbers of info are summed"


def test_a_real_gymnasium_environment() -> None:
    gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed")
    actions = {"left": 0, "down": 1, "right": 2, "up": 3}

    def make() -> Any:
        return gymnasium.make("FrozenLake-v1", is_slippery=False)

    _, results = play(GymEnvironment(make, actions=actions), "down", "down", "right", "right", "down", "right")
    assert [result.messages[0].content for result in results] == ["4", "8", "9", "10", "14", "15"]
    assert [result.reward for result in results] == [0, 0, 0, 0, 0, 1]
    assert results[-1].done


# OpenEnv


@dataclass
class Answer:
    observation: Any
    reward: float | None = None
    done: bool = False


class Echo:
    """OpenEnv's form: says what it is told; `is_async` as the newer clients are."""

    def __init__(self, is_async: bool) -> None:
        self.is_async, self.closed = is_async, False

    def _give(self, value: Any) -> Any:
        async def later() -> Any:
            return value

        return later() if self.is_async else value

    def reset(self, **options: Any) -> Any:
        return self._give(Answer({"ready": True, **options}))

    def step(self, action: Any) -> Any:
        return self._give(Answer({"echo": action["message"]}, reward=0.5, done=action["message"] == "end"))

    def close(self) -> Any:
        self.closed = True
        return self._give(None)


@pytest.mark.parametrize("is_async", [False, True])
def test_an_openenv_client(is_async: bool) -> None:
    client = Echo(is_async)
    opening, results = play(OpenEnvEnvironment(lambda: client), "hello", "end", openenv={"seed": 3})
    assert opening[0].content == '{"ready": true, "seed": 3}'
    assert results[0] == StepResult(messages=results[0].messages, reward=0.5)
    assert results[0].messages[0].content == '{"echo": "hello"}'
    assert results[1].done
    assert client.closed


def test_a_real_openenv_environment() -> None:
    pytest.importorskip("openenv.core", reason="openenv-core is not installed")
    from openenv.core import GenericEnvClient
    from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app

    class Say(Action):
        message: str

    class Heard(Observation):
        text: str

    class Parrot(Environment):  # type: ignore[misc]
        SUPPORTS_CONCURRENT_SESSIONS = True

        def __init__(self) -> None:
            super().__init__()
            self._state = State(episode_id="e", step_count=0)

        def reset(self, seed: int | None = None, episode_id: str | None = None, **options: Any) -> Heard:
            return Heard(text="say something", done=False, reward=0.0)

        def step(self, action: Say, timeout_s: float | None = None, **options: Any) -> Heard:
            return Heard(text=action.message.upper(), done=action.message == "bye", reward=1.0)

        @property
        def state(self) -> State:
            return self._state

    import socket
    import threading
    import time

    import uvicorn

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = create_fastapi_app(Parrot, Say, Heard)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        environment = OpenEnvEnvironment(
            lambda: GenericEnvClient(base_url=f"http://127.0.0.1:{port}"), show=lambda seen: seen["text"]
        )
        opening, results = play(environment, "hello", "bye")
    finally:
        server.should_exit = True
        thread.join(10)
    assert opening[0].content == "say something"
    assert [(result.messages[0].content, result.reward, result.done) for result in results] == [
        ("HELLO", 1.0, False),
        ("BYE", 1.0, True),
    ]


# verifiers


def test_tasks_of_verifiers() -> None:
    vf = pytest.importorskip("verifiers.v1", reason="verifiers is not installed")

    class Sum(vf.TaskData):  # type: ignore[misc,name-defined]
        answer: int

    class Adder(vf.Toolset):  # type: ignore[misc,name-defined]
        @vf.tool
        def add(self, a: int, b: int) -> int:
            """Add two numbers."""
            return a + b

    class SumTask(vf.Task[Sum, vf.State, vf.TaskConfig]):  # type: ignore[misc,name-defined]
        @classmethod
        def toolsets(cls, config: Any) -> Sequence[Any]:
            return [Adder(vf.ToolsetConfig())]

        @vf.reward(weight=2.0)
        async def right(self, task: Sum, trace: Any) -> float:
            return float(trace.last_reply == str(task.answer))

        @vf.metric
        async def tool_turns(self, trace: Any) -> float:
            return float(len(trace.tool_messages))

    class Sums(vf.Taskset[SumTask, vf.TasksetConfig]):  # type: ignore[misc,name-defined]
        def load(self) -> Any:
            for n in range(3):
                yield SumTask(Sum(prompt=f"{n} + 10?", system_prompt="Use the tool.", answer=n + 10), vf.TaskConfig())

    taskset = list(Sums(vf.TasksetConfig()))
    tasks = verifiers_tasks(taskset)
    from posttrain.core import ToolCall

    call = CALL_SYNTAXES["hermes"].write([ToolCall(name="add", arguments={"a": 2, "b": 10})])
    says = iter([call, "12"])
    (group,) = asyncio.run(
        run_episodes(
            ScriptedEngine(lambda request: next(says), TOKENIZER),
            tasks[2:],
            lambda: VerifiersEnvironment(taskset),
            Sampling(max_tokens=200, n=1),
            turns=TurnTokens(Renderer(TOKENIZER)),
            seed=0,
        )
    )
    (trajectory,) = group.trajectories
    assert trajectory.error is None
    assert [m.content for m in trajectory.messages] == ["Use the tool.", "2 + 10?", "", "12", "12"]
    assert trajectory.metrics["reward"] == 2.0
    assert trajectory.metrics["tool_turns"] == 1.0
    with pytest.raises(UsageError, match="none of this task set"):
        asyncio.run(VerifiersEnvironment(taskset).reset(Task(id="other", prompt="")))


def test_without_verifiers_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "verifiers", None)
    monkeypatch.setitem(sys.modules, "verifiers.v1", None)
    monkeypatch.setitem(sys.modules, "verifiers.v1.utils.decorators", None)

    class Theirs:
        NEEDS_CONTAINER = False
        config = None

        class data:
            id, prompt_text, system_prompt, prompt = "a", "b", None, "b"

    (task,) = verifiers_tasks([Theirs()])
    with pytest.raises(MissingExtraError, match="verifiers"):
        asyncio.run(VerifiersEnvironment([Theirs()]).reset(task))
