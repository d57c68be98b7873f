"""Users played by a model: whose words are whose, when they stop, and that they share an engine in lockstep."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from posttrain.core import Message, Sampling, Task, UsageError, assistant, user
from posttrain.engine import EngineChat, ScriptedEngine
from posttrain.render import Renderer, Tokenizer
from posttrain.rollout import Lockstep, SimulatedUser, TurnTokens, run_episodes, turn_spans

TOKENIZER = Tokenizer.train_bpe(["I want my parcel."], 300, ("<|im_end|>", "<|im_start|>"))
RENDERER = Renderer(TOKENIZER)


class Says:
    """A chat that says what it is told to, and keeps what it was asked."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked = list(texts), []

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Message:
        self.asked.append((list(messages), sampling))
        return assistant(self.texts.pop(0))


def parcel(**facts: Any) -> Task:
    return Task(id="parcel", prompt="Get your parcel.", facts=facts)


def talk(chat: Any, *answers: str, task: Task | None = None, **options: Any) -> list[Any]:
    """Opening and results of a conversation in which the policy says these answers."""

    async def run() -> list[Any]:
        environment = SimulatedUser(chat, **options)
        environment.seed(5)
        results: list[Any] = [await environment.reset(task or parcel())]
        for answer in answers:
            results.append(await environment.step(assistant(answer)))
        await environment.close()
        return results

    return asyncio.run(run())


def test_the_user_sees_the_conversation_from_the_other_side() -> None:
    chat = Says("Where is it?", "Number 7.", "Thanks! ###STOP### Bye")
    opening, first, second = talk(chat, "Which number?", "It comes today.")
    assert opening == (user("Where is it?"),)
    assert (first.messages, first.done) == ((user("Number 7."),), False)
    assert (second.messages, second.done, second.info) == ((), True, {"user/satisfied": 1})
    messages, _ = chat.asked[-1]
    assert messages[0].role == "system"
    assert "What you want: Get your parcel." in messages[0].content
    assert [(message.role, message.content) for message in messages[1:]] == [
        ("user", "(The assistant waits. Begin.)"),
        ("assistant", "Where is it?"),
        ("user", "Which number?"),
        ("assistant", "Number 7."),
        ("user", "It comes today."),
    ]
    seeds = [sampling.seed for _, sampling in chat.asked]
    assert len(set(seeds)) == 3, "every turn draws anew"


def test_the_same_seed_asks_the_same() -> None:
    one, two = Says("a", "b"), Says("a", "b")
    talk(one, "x")
    talk(two, "x")
    assert one.asked == two.asked


def test_persona_and_goal_come_from_the_task() -> None:
    chat = Says("Hello")
    talk(chat, task=parcel(persona="A tired nurse.", goal="Find the {ward}."))
    told = chat.asked[0][0][0].content
    assert "Who you are: A tired nurse." in told
    assert "What you want: Find the {ward}." in told
    with pytest.raises(UsageError, match="needs a goal"):
        talk(Says("x"), task=Task(id="x", prompt=""))


def test_patience_ends() -> None:
    *_, last = talk(Says("a", "b", "c"), "1", "2", "3", max_exchanges=3)
    assert (last.done, last.info) == (True, {"user/satisfied": 0})
    *_, last = talk(Says("a", ""), "1")
    assert last.done, "a user who says nothing has gone"


@pytest.mark.parametrize("is_async", [False, True])
def test_the_judge_reads_the_whole_conversation(is_async: bool) -> None:
    def plain(task: Task, messages: Sequence[Message]) -> float:
        return float(task.id == "parcel" and [m.content for m in messages] == ["a", "1", "b", "2"])

    async def awaited(task: Task, messages: Sequence[Message]) -> float:
        return plain(task, messages)

    judge: Callable[..., Any] = awaited if is_async else plain
    *_, last = talk(Says("a", "b", "###STOP###"), "1", "2", judge=judge)
    assert last.reward == 1.0


def test_policy_and_user_share_an_engine_in_lockstep() -> None:
    """Self-play of a conversation: one engine writes both sides; only the policy's side is trained on."""
    calls: list[int] = []

    class Counting(ScriptedEngine):
        async def sample(self, requests: Any) -> Any:
            calls.append(len(requests))
            return await super().sample(requests)

    def say(request: Any) -> str:
        text = TOKENIZER.decode(request.prompt, skip_special_tokens=False)
        if "You play a person" not in text:
            return "It comes."
        return "###STOP###" if text.count("It comes.") >= 2 else "Where?"

    lockstep = Lockstep(Counting(say, TOKENIZER))
    chat = EngineChat(lockstep, RENDERER)
    tasks = [Task(id=f"parcel-{n}", prompt="Get your parcel.") for n in range(6)]
    groups = asyncio.run(
        run_episodes(
            lockstep,
            tasks,
            lambda: SimulatedUser(chat, judge=lambda task, messages: 0.5),
            Sampling(max_tokens=60, n=2),
            turns=TurnTokens(RENDERER),
            seed=1,
        )
    )
    trajectories = [t for group in groups for t in group.trajectories]
    assert {t.metrics["reward"] for t in trajectories} == {0.5}
    for trajectory in trajectories:
        own = [TOKENIZER.decode(trajectory.tokens[start:end]) for start, end in turn_spans(trajectory)]
        assert own == ["It comes.", "It comes."]
    # The users open, the policy (whose siblings share a request), the users, the policy, the users.
    assert calls == [12, 6, 12, 12, 12]
