"""Tasks of the `verifiers` package (its version 1 layout): prompt, tools in this process, and its own scoring."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from posttrain.core import Message, MissingExtraError, StepResult, Task, ToolSpec, UsageError, system, user
from posttrain.rollout.environment_tools import ToolEnvironment
from posttrain.rollout.tools import FunctionTool

_PLACE = "verifiers_task"  # the fact that says which task of the task set is meant


def verifiers_tasks(taskset: Iterable[Any], *, limit: int | None = None) -> list[Task]:
    """The tasks of a `verifiers` task set, to be given to `run_episodes` with a `VerifiersEnvironment` of the same.

    Args:
        taskset: a `verifiers.v1.Taskset` (or tasks of one).
        limit: at most so many.
    """
    tasks = []
    for place, each in enumerate(taskset):
        if limit is not None and place == limit:
            break
        facts = {_PLACE: place}
        tasks.append(Task(id=each.data.id or f"verifiers-{place}", prompt=each.data.prompt_text, facts=facts))
    return tasks


class VerifiersEnvironment:
    """One episode with a task of `verifiers`: its tools are called, and at the end it scores the conversation.

    Tools are the `@tool` methods of the task's toolsets, called in this process; toolsets that share state with the
    task, and tasks that need a container, are refused. Rewards that need a runtime are left out by `verifiers` itself.

    Args:
        taskset: what `verifiers_tasks` was given; read once, shared by the episodes.
    """

    def __init__(self, taskset: Sequence[Any]) -> None:
        self._taskset = taskset
        self._inner: ToolEnvironment | None = None
        self._task: Any = None
        self._trace: Any = None

    @property
    def tools(self) -> Sequence[ToolSpec]:
        """Of the task's toolsets."""
        return () if self._inner is None else self._inner.tools

    async def reset(self, task: Task) -> Sequence[Message]:
        """The task's system prompt and prompt.

        Raises:
            UsageError: the task is none of the task set, or needs what is not there.
        """
        place = task.facts.get(_PLACE)
        if not isinstance(place, int) or not 0 <= place < len(self._taskset):
            raise UsageError(f"task {task.id!r} is none of this task set; make tasks with verifiers_tasks(taskset)")
        self._task = self._taskset[place]
        if self._task.NEEDS_CONTAINER:
            raise UsageError(f"task {task.id!r} needs a container; run it with verifiers' own runtimes")
        self._inner = ToolEnvironment([FunctionTool(each) for each in _tools_of(self._task)])
        await self._inner.reset(task)
        opening = [_message(each) for each in self._prompt()]
        self._trace = _Trace(self._task, opening)
        return tuple(opening)

    async def step(self, action: Message) -> StepResult:
        """Run calls; score the conversation at its end."""
        assert self._inner is not None, "reset comes first"
        result = await self._inner.step(action)
        self._trace.add([action], sampled=True)
        self._trace.add(result.messages)
        if not result.done:
            return result
        reward, metrics = await self._trace.score()
        return result.replace(reward=result.reward + reward, info={**result.info, **metrics})

    async def close(self) -> None:
        """Free what the tools hold."""
        if self._inner is not None:
            await self._inner.close()

    def _prompt(self) -> list[Any]:
        data = self._task.data
        first = [] if data.system_prompt is None else [system(data.system_prompt)]
        if data.prompt is None:
            raise UsageError("the task has no prompt: a user opens it; play that user with a SimulatedUser")
        return [*first, *([user(data.prompt)] if isinstance(data.prompt, str) else data.prompt)]


def _verifiers(module: str = "verifiers.v1") -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError("verifiers", "environments", "a task of verifiers") from error


def _tools_of(task: Any) -> list[Any]:
    discover = _verifiers("verifiers.v1.utils.decorators").discover_decorated
    stateless = _verifiers().State
    found = []
    for toolset in type(task).toolsets(task.config):
        if getattr(toolset, "_state_cls", stateless) is not stateless:
            raise UsageError(f"the toolset {type(toolset).__name__} shares state with its task; serve it over MCP")
        found.extend(discover(toolset, "tool"))
    return found


def _message(each: Any) -> Message:
    if isinstance(each, Message):
        return each
    if not isinstance(each.content, str):
        raise UsageError("the task's prompt has pictures, which are not supported")
    return Message(role=each.role, content=each.content)


class _Trace:
    """The conversation as `verifiers` scores it."""

    def __init__(self, task: Any, opening: Sequence[Message]) -> None:
        vf = _verifiers()
        self._task = task
        made = vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
        self._trace = vf.Trace(task=made, state=vf.State(), agent=vf.AgentInfo(config=vf.AgentConfig()))
        self.add(opening)

    def add(self, messages: Sequence[Message], *, sampled: bool = False) -> None:
        vf = _verifiers()
        nodes = self._trace.nodes
        for message in messages:
            parent = len(nodes) - 1 if nodes else None
            nodes.append(vf.MessageNode(parent=parent, message=_theirs(vf, message), sampled=sampled))

    async def score(self) -> tuple[float, dict[str, float]]:
        """The weighted sum of its rewards; and its rewards and metrics by name."""
        await self._task.score(self._trace)
        rewards = {
            f"rewards/{name}": reward.value for name, reward in self._trace.rewards.items() if reward is not None
        }
        return float(self._trace.reward), {**self._trace.metrics, **rewards}


def _theirs(vf: Any, message: Message) -> Any:
    if message.role == "assistant":
        calls = [
            vf.ToolCall(id=call.id or "", name=call.name, arguments=json.dumps(call.arguments))
            for call in message.tool_calls
        ]
        return vf.AssistantMessage(
            content=message.content or None, reasoning_content=message.reasoning, tool_calls=calls or None
        )
    if message.role == "tool":
        return vf.ToolMessage(tool_call_id=message.tool_call_id or "", content=message.content, name=message.name)
    return (vf.SystemMessage if message.role == "system" else vf.UserMessage)(content=message.content)
