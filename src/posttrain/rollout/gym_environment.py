"""Environments of other houses: Gymnasium's `Env` and OpenEnv's clients, as environments of ours.

Both are taken as they are, by their methods: nothing of theirs is imported.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from posttrain.core import Message, StepResult, Task, user

_NUMBER = re.compile(r"-?\d{1,9}")


class GymEnv(Protocol):
    """What is needed of a `gymnasium.Env`."""

    action_space: Any

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """The first observation."""
        ...

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Observation, reward, terminated, truncated, info."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class GymEnvironment:
    """A Gymnasium environment played in words.

    Args:
        make: makes the environment of one episode, for example `lambda: gymnasium.make("FrozenLake-v1")`.
        rules: the first message; the first observation follows it.
        actions: by word, what the policy may do; None: the first number in its turn (a `Discrete` space) or its whole
            text (any other space).
        show: an observation as text; default `str`.
        invalid_reward: for a turn that names no action; the environment is then not stepped.

    The task's `facts["gym"]` (a dict) is given to `reset` as its `options`.
    """

    def __init__(
        self,
        make: Callable[[], GymEnv],
        *,
        rules: str = "",
        actions: Mapping[str, Any] | None = None,
        show: Callable[[Any], str] = str,
        invalid_reward: float = 0.0,
    ) -> None:
        self._make, self._rules, self._actions, self._show = make, rules, actions, show
        self._invalid_reward = invalid_reward
        self._seed: int | None = None
        self._env: GymEnv | None = None

    def seed(self, seed: int) -> None:
        """Given to the environment's `reset`."""
        self._seed = seed % 2**31

    async def reset(self, task: Task) -> Sequence[Message]:
        """The rules and the first observation."""
        self._env = await asyncio.to_thread(self._make)
        observation, _ = await asyncio.to_thread(self._env.reset, seed=self._seed, options=task.facts.get("gym"))
        prompt = task.prompt if isinstance(task.prompt, str) else ""
        parts = [self._rules, prompt, self._show(observation)]
        return (user("\n".join(part for part in parts if part)),)

    async def step(self, action: Message) -> StepResult:
        """Do what the policy says."""
        assert self._env is not None, "reset comes first"
        found, chosen = self._chosen(action.content)
        if not found:
            choices = ", ".join(self._actions) if self._actions else str(self._env.action_space)
            told = user(f"That is no action. Actions: {choices}")
            return StepResult(messages=(told,), reward=self._invalid_reward, info={"invalid_actions": 1})
        observation, reward, terminated, truncated, info = await asyncio.to_thread(self._env.step, chosen)
        numbers = {name: float(value) for name, value in info.items() if isinstance(value, int | float)}
        return StepResult(
            messages=(user(self._show(observation)),),
            reward=float(reward),
            done=bool(terminated or truncated),
            info={**numbers, "truncated": int(truncated)},
        )

    async def close(self) -> None:
        """Close the environment."""
        if self._env is not None:
            await asyncio.to_thread(self._env.close)

    def _chosen(self, text: str) -> tuple[bool, Any]:
        """Whether the turn names an action, and which."""
        if self._actions is not None:
            words = re.findall(r"\w+", text.lower())
            named = [name for name in self._actions if name.lower() in words]
            return (True, self._actions[named[0]]) if named else (False, None)
        assert self._env is not None
        space = self._env.action_space
        number = _NUMBER.search(text)
        chosen: Any = text.strip()
        if number is not None and not space.contains(chosen):
            chosen = int(number.group())
        return bool(space.contains(chosen)), chosen


class OpenEnvEnvironment:
    """An OpenEnv server's environment, through its client.

    Args:
        connect: makes the client of one episode, for example
            `lambda: GenericEnvClient(base_url="ws://localhost:8000")`; its methods may be async or not.
        to_action: the action of a turn; default {"message": its text}.
        show: an observation as text; default JSON.
        rules: the first message; the first observation follows it.

    The task's `facts["openenv"]` (a dict) is given to `reset` as keyword arguments.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        *,
        to_action: Callable[[Message], Any] = lambda turn: {"message": turn.content},
        show: Callable[[Any], str] | None = None,
        rules: str = "",
    ) -> None:
        self._connect, self._to_action, self._rules = connect, to_action, rules
        self._show = show or _as_json
        self._client: Any = None

    async def reset(self, task: Task) -> Sequence[Message]:
        """The rules and the first observation."""
        self._client = self._connect()
        result = await _awaited(self._client.reset(**task.facts.get("openenv", {})))
        prompt = task.prompt if isinstance(task.prompt, str) else ""
        parts = [self._rules, prompt, self._show(result.observation)]
        return (user("\n".join(part for part in parts if part)),)

    async def step(self, action: Message) -> StepResult:
        """Do what the policy says."""
        result = await _awaited(self._client.step(self._to_action(action)))
        return StepResult(
            messages=(user(self._show(result.observation)),), reward=float(result.reward or 0.0), done=bool(result.done)
        )

    async def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            await _awaited(self._client.close())


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def _as_json(observation: Any) -> str:
    if isinstance(observation, str):
        return observation
    plain = observation.model_dump() if hasattr(observation, "model_dump") else observation
    return json.dumps(plain, ensure_ascii=False, default=str)
