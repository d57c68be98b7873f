"""A user played by a model: it has a persona and a goal, writes the user's turns, and says when it is done."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from posttrain.core import Chat, Message, Sampling, StepResult, Task, UsageError, assistant, derive_seed, system, user
from posttrain.rollout.environment_tools import Judge

STOP = "###STOP###"

INSTRUCTIONS = """\
You play a person who talks to an assistant. Write only what this person says, one message at a time.
Who you are: {persona}
What you want: {goal}
Stay in this role; do not help the assistant, and make up no facts beyond these. When you have what you want, or see
that you will not get it, write {stop}."""


class SimulatedUser:
    """Answers the policy as a person with a goal would.

    Args:
        chat: the model that plays the user; `engine.EngineChat` or `engine.RemoteChat`. One that samples from the same
            engine as the policy, in lockstep, is given the `Lockstep` as its engine.
        persona: who speaks; the task's `facts["persona"]` comes first.
        goal: what they want; the task's `facts["goal"]`, then its `prompt`, come first.
        sampling: of the user's turns; its seed is replaced.
        max_exchanges: the user goes away after so many answers.
        stop: what the user writes when done; what stands before it is not shown.
        judge: the reward at the end, from the task and the conversation; plain or async. None: 0.
        instructions: the system message of the user's model; {persona}, {goal} and {stop} are filled in.
    """

    def __init__(
        self,
        chat: Chat,
        *,
        persona: str = "An ordinary customer.",
        goal: str = "",
        sampling: Sampling | None = None,
        max_exchanges: int = 8,
        stop: str = STOP,
        judge: Judge | None = None,
        instructions: str = INSTRUCTIONS,
    ) -> None:
        if max_exchanges < 1:
            raise UsageError(f"a simulated user: max_exchanges must be at least 1, not {max_exchanges}")
        self.chat = chat
        self.sampling = sampling or Sampling(max_tokens=200)
        self._persona, self._goal, self._instructions = persona, goal, instructions
        self._max_exchanges, self._stop, self._judge = max_exchanges, stop, judge
        self._seed = 0
        self._task: Task | None = None
        self._messages: list[Message] = []  # as the policy sees them
        self._told = ""

    def seed(self, seed: int) -> None:
        """Decide all that the user says."""
        self._seed = seed

    async def reset(self, task: Task) -> Sequence[Message]:
        """The user's first message.

        Raises:
            UsageError: there is no goal.
        """
        goal = str(task.facts.get("goal") or task.prompt_text() or self._goal)
        if not goal:
            raise UsageError(f"task {task.id!r}: a simulated user needs a goal: facts['goal'], a prompt, or goal=…")
        persona = str(task.facts.get("persona", self._persona))
        self._told = self._instructions.format(persona=persona, goal=goal, stop=self._stop)
        self._task, self._messages = task, []
        said, _ = await self._speak()
        self._messages.append(user(said or goal))
        return tuple(self._messages)

    async def step(self, action: Message) -> StepResult:
        """What the user answers; the end, when they are done."""
        self._messages.append(action)
        exchanges = sum(message.role == "assistant" for message in self._messages)
        said, satisfied = "", False
        if exchanges < self._max_exchanges:
            said, satisfied = await self._speak()
        if not said:
            return StepResult(done=True, reward=await self._judged(), info={"user/satisfied": int(satisfied)})
        self._messages.append(user(said))
        return StepResult(messages=(user(said),))

    async def close(self) -> None:
        """Nothing to free: the chat may be shared."""

    async def _speak(self) -> tuple[str, bool]:
        """The user's next words, and whether they are the last."""
        flipped = [system(self._told)]
        if not self._messages:
            flipped.append(user("(The assistant waits. Begin.)"))
        for message in self._messages:
            if message.role == "assistant" and message.content:
                flipped.append(user(message.content))
            elif message.role == "user":
                flipped.append(assistant(message.content))
        if flipped[1].role == "assistant":
            flipped.insert(1, user("(The assistant waits. Begin.)"))
        seed = derive_seed(self._seed, "user", len(self._messages))
        answer = await self.chat.chat(flipped, self.sampling.replace(seed=seed))
        said, found, _ = answer.content.partition(self._stop)
        return ("", True) if found else (said.strip(), False)

    async def _judged(self) -> float:
        if self._judge is None or self._task is None:
            return 0.0
        judged = self._judge(self._task, tuple(self._messages))
        return float(await judged if inspect.isawaitable(judged) else judged)
