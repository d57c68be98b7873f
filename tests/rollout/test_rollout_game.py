"""Games: the rules of the simplest ones, and several players at one table."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from posttrain.core import (
    Completion,
    EngineError,
    Message,
    SampleRequest,
    Sampling,
    StopReason,
    Task,
    UsageError,
    assistant,
)
from posttrain.engine import ScriptedEngine
from posttrain.render import Renderer, Tokenizer
from posttrain.rollout import (
    EpisodeLimits,
    GuessNumber,
    Hangman,
    Moved,
    TurnTokens,
    run_self_play,
    turn_rewards,
    turn_spans,
)

TOKENIZER = Tokenizer.train_bpe(["Take 1, 2 or 3 of 7 stones."] * 3, 300, ("<|im_end|>", "<|im_start|>"))
TURNS = TurnTokens(Renderer(TOKENIZER))


class Nim:
    """Two players take one, two or three stones in turn; who takes the last wins."""

    players = ("first", "second")

    def __init__(self) -> None:
        self.stones = 7

    async def begin(self, task: Task) -> Mapping[str, str]:
        self.stones = int(task.facts.get("stones", 7))
        return dict.fromkeys(self.players, f"Nim with {self.stones} stones.")

    async def move(self, player: str, turn: Message) -> Moved:
        other = self.players[player == "first"]
        taken = int(turn.content) if turn.content in ("1", "2", "3") else 0
        if not 1 <= taken <= self.stones:
            return Moved(rewards={player: -1.0, other: 1.0})
        self.stones -= taken
        if self.stones == 0:
            return Moved(rewards={player: 1.0, other: -1.0})
        return Moved(next=other, seen={other: f"They took {taken}; {self.stones} are left."})


def stones(prompt: str) -> int:
    """How many are left, from the prompt."""
    if "are left" in prompt:
        return int(prompt.rpartition(" are left")[0].rpartition("; ")[2])
    return int(prompt.partition("Nim with ")[2].partition(" ")[0])


def clever(prompt: str) -> str:
    return str(stones(prompt) % 4 or 1)


def greedy(prompt: str) -> str:
    return "1"


def engine(play: Any) -> ScriptedEngine:
    return ScriptedEngine(lambda request: play(TOKENIZER.decode(request.prompt, skip_special_tokens=False)), TOKENIZER)


def play(samplers: Any, tasks: Sequence[Task] = (), **settings: Any) -> Any:
    values = {"turns": TURNS, "seed": 3, **settings}
    asked = tasks or [Task(id="seven", prompt="", facts={"stones": 7})]
    return asyncio.run(run_self_play(samplers, asked, Nim, Sampling(max_tokens=20, n=2), **values))


# Several players


def test_every_player_has_a_list_of_tokens() -> None:
    groups = play({"first": engine(clever), "second": engine(greedy)})
    (first,), (second,) = groups["first"], groups["second"]
    winner, loser = first.trajectories[0], second.trajectories[0]
    shown = TOKENIZER.decode(winner.tokens, skip_special_tokens=False)
    assert shown.startswith("<|im_start|>user\nNim with 7 stones.<|im_end|>\n<|im_start|>assistant\n3<|im_end|>")
    assert "They took 1; 3 are left." in shown
    other = TOKENIZER.decode(loser.tokens, skip_special_tokens=False)
    assert other.startswith("<|im_start|>user\nNim with 7 stones.\nThey took 3; 4 are left.<|im_end|>")
    assert turn_rewards(winner) == [0.0, 1.0]
    assert turn_rewards(loser) == [-1.0], "the loser learns of it in the turn that lost"
    assert [len(turn_spans(t)) for t in (winner, loser)] == [2, 1]
    assert (winner.id, loser.id, loser.group) == ("seven#first/0/0", "seven#second/0/0", "seven#second/0")
    assert [t.index for t in first.trajectories] == [0, 1]


@pytest.mark.parametrize("lockstep", [False, True])
def test_the_policy_plays_itself(lockstep: bool) -> None:
    tasks = [Task(id=f"n{n}", prompt="", facts={"stones": n}) for n in range(3, 19)]
    groups = play(engine(clever), tasks, lockstep=lockstep)
    for first, second in zip(groups["first"], groups["second"], strict=True):
        left = first.task.facts["stones"]
        expected = -1.0 if left % 4 == 0 else 1.0  # who meets a multiple of four loses against good play
        for one, other in zip(first.trajectories, second.trajectories, strict=True):
            if left == 3:  # taken at once: the second player never has a turn
                assert other.error == "RolloutError: the game ended before the first turn of second"
                continue
            assert (one.metrics["reward"], other.metrics["reward"]) == (expected, -expected)
            assert not other.failed()


def test_lockstep_asks_for_the_turns_of_all_games_together() -> None:
    sizes = []

    class Counting(ScriptedEngine):
        async def sample(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
            sizes.append(len(requests))
            return await super().sample(requests)

    sampler = Counting(lambda request: "1", TOKENIZER)
    tasks = [Task(id=f"n{n}", prompt="", facts={"stones": 6}) for n in range(5)]
    play(sampler, tasks, lockstep=True)
    assert sizes == [10] * 6, "six moves in each of ten games"


def test_a_player_who_fails_ends_the_game_for_all() -> None:
    class Broken:
        async def sample(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
            raise EngineError("gone")

    groups = play({"first": engine(clever), "second": Broken()})
    (one,), (other,) = (groups[name][0].trajectories[:1] for name in ("first", "second"))
    assert (other.stop_reason, other.error) == (StopReason.ERROR, "sampler: EngineError: gone")
    assert (one.failed(), one.metrics["abandoned"], one.metrics["reward"]) == (False, 1.0, 0.0)


def test_a_player_who_is_cut_off_ends_the_game() -> None:
    groups = play(engine(greedy), limits=EpisodeLimits(max_turns=2))
    first = groups["first"][0].trajectories[0]
    assert first.stop_reason is StopReason.LENGTH or first.metrics.get("abandoned") == 1.0


def test_misuse() -> None:
    with pytest.raises(UsageError, match="no sampler for the player 'second'"):
        play({"first": engine(clever)})
    with pytest.raises(UsageError, match="the same sampler"):
        play({"first": engine(clever), "second": engine(clever)}, lockstep=True)

    class Wrong(Nim):
        async def move(self, player: str, turn: Message) -> Moved:
            return Moved(next="nobody")

    with pytest.raises(UsageError, match="'nobody', who does not play"):
        asyncio.run(run_self_play(engine(greedy), [Task(id="x", prompt="")], Wrong, Sampling(n=1), turns=TURNS, seed=0))


# The simplest games


def steps(environment: Any, task: Task, *says: str) -> list[tuple[str, float, bool]]:
    async def run() -> list[tuple[str, float, bool]]:
        results = [("".join(m.content for m in await environment.reset(task)), 0.0, False)]
        for text in says:
            result = await environment.step(assistant(text))
            results.append((result.messages[0].content, round(result.reward, 6), result.done))
        await environment.close()
        return results

    return asyncio.run(run())


def test_guess_a_number() -> None:
    task = Task(id="g", prompt="", facts={"number": 4})
    assert steps(GuessNumber(guesses=4), task, "Is it 9?", "2", "hm", "4") == [
        ("Guess my number from 1 to 10.", 0.0, False),
        ("Lower.", 0.0, False),
        ("Higher.", 0.0, False),
        ("Say a number.", 0.0, False),
        ("Right!", 1.0, True),
    ]
    assert steps(GuessNumber(guesses=1), task, "5")[-1] == ("Lower.", 0.0, True)
    one, two = GuessNumber(high=1000), GuessNumber(high=1000)
    one.seed(11)
    two.seed(11)
    assert one._number == two._number


def test_hangman() -> None:
    task = Task(id="h", prompt="", answer="Anna")
    assert steps(Hangman(misses=2), task, "a", "x", "n") == [
        ("Guess the word, a letter at a time: _ _ _ _", 0.0, False),
        ("a _ _ a (2 misses left)", 0.5, False),
        ("a _ _ a (1 misses left)", 0.0, False),
        ("a n n a", 1.5, True),
    ]
    assert steps(Hangman(misses=1), task, "hanna")[-1] == ("_ _ _ _ (0 misses left)", 0.0, True)
    assert steps(Hangman(), task, "ANNA")[-1] == ("a n n a", 2.0, True)
