"""The environment of an agent with tools: calls are run, and an answer without calls goes to a user or ends it."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from posttrain.core import Environment, Message, StepResult, Task, ToolSpec, UsageError, user
from posttrain.rollout.tools import Tool, Toolbox

Judge = Callable[[Task, Sequence[Message]], float | Awaitable[float]]
Tools = Sequence[Tool | Callable[..., Any]]
CloseTools = Callable[[], Awaitable[None] | None]


class ToolEnvironment:
    """Answers calls with the tools' results until the policy answers without one.

    Args:
        tools: tools or typed functions, or what makes them of the task, plain or async; bound methods of an object
            that was made for this episode keep its state.
        judge: the reward at the end, from the task and the whole conversation; plain or async. None: 0.
        partner: what answers turns without calls, such as a `SimulatedUser`; the episode then ends when it says so.
            None: the first turn without calls is the last.
        system: a system message before the task's prompt.
        timeout_s: for each call.
        max_characters: of a result.
        failed_reward: added for every call that fails.
        on_close: called at the end, to free what the tools hold.
    """

    def __init__(
        self,
        tools: Tools | Callable[[Task], Tools | Awaitable[Tools]],
        *,
        judge: Judge | None = None,
        partner: Environment | None = None,
        system: str | None = None,
        timeout_s: float = 10.0,
        max_characters: int = 4000,
        failed_reward: float = 0.0,
        on_close: CloseTools | None = None,
    ) -> None:
        self._tools, self._timeout_s, self._max_characters = tools, timeout_s, max_characters
        self._toolbox: Toolbox | None = None if callable(tools) else self._boxed(tools)
        self._judge, self._partner, self._system = judge, partner, system
        self._failed_reward, self._on_close = failed_reward, on_close
        self._task: Task | None = None
        self._messages: list[Message] = []

    @property
    def tools(self) -> Sequence[ToolSpec]:
        """What the policy may call."""
        return () if self._toolbox is None else self._toolbox.specs

    async def reset(self, task: Task) -> Sequence[Message]:
        """The task's prompt, or what the partner says first."""
        self._task = task
        if callable(self._tools):
            made = self._tools(task)
            self._toolbox = self._boxed(await made if inspect.isawaitable(made) else made)
        if self._partner is not None:
            opening = list(await self._partner.reset(task))
        else:
            opening = [user(task.prompt)] if isinstance(task.prompt, str) else list(task.prompt)
        if self._system is not None:
            opening.insert(0, Message(role="system", content=self._system))
        self._messages = opening
        return tuple(opening)

    async def step(self, action: Message) -> StepResult:
        """Results of the calls; the end, or the partner's answer, where there are none."""
        self._messages.append(action)
        result = await self._call(action) if action.tool_calls else await self._reply(action)
        self._messages.extend(result.messages)
        if result.done and self._judge is not None:
            result = result.replace(reward=result.reward + await self._judged())
        return result

    async def close(self) -> None:
        """Free what tools and partner hold."""
        if self._partner is not None:
            await self._partner.close()
        if self._on_close is not None:
            closing = self._on_close()
            if inspect.isawaitable(closing):
                await closing

    def _boxed(self, tools: Tools) -> Toolbox:
        return Toolbox(tools, timeout_s=self._timeout_s, max_characters=self._max_characters)

    async def _call(self, action: Message) -> StepResult:
        if self._toolbox is None:
            raise UsageError("the environment was stepped before it was reset")
        outcomes = await self._toolbox.call_all(action.tool_calls)
        failures = sum(outcome.failed for outcome in outcomes)
        return StepResult(
            messages=tuple(outcome.message for outcome in outcomes),
            reward=sum(outcome.reward for outcome in outcomes) + self._failed_reward * failures,
            done=any(outcome.done for outcome in outcomes),
            info={"tools/calls": len(outcomes), "tools/failures": failures},
        )

    async def _reply(self, action: Message) -> StepResult:
        return StepResult(done=True) if self._partner is None else await self._partner.step(action)

    async def _judged(self) -> float:
        if self._task is None or self._judge is None:
            raise UsageError("the environment was stepped before it was reset")
        judged = self._judge(self._task, tuple(self._messages))
        return float(await judged if inspect.isawaitable(judged) else judged)
