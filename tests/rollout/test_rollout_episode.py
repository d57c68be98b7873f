"""Episodes: what lands in the token list, whose it is, where it ends, and that nothing is rendered twice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from posttrain.core import (
    Completion,
    EngineError,
    Message,
    SampleRequest,
    Sampling,
    StepResult,
    StopReason,
    Task,
    Trajectory,
    UsageError,
    user,
)
from posttrain.engine import ScriptedEngine
from posttrain.render import Renderer, Tokenizer
from posttrain.rollout import (
    EpisodeLimits,
    EpisodeReward,
    Group,
    GuessNumber,
    Hangman,
    Lockstep,
    TurnTokens,
    check_failures,
    episode_metrics,
    per_turn,
    run_episodes,
    to_examples,
    turn_rewards,
    turn_spans,
)

TOKENIZER = Tokenizer.train_bpe(
    ["Guess my number from 1 to 10. Higher. Lower. Say a number."] * 3, 300, ("<|im_end|>", "<|im_start|>")
)
TURNS = TurnTokens(Renderer(TOKENIZER))
SAMPLING = Sampling(max_tokens=40, n=2)


def run(sampler: Any, factory: Callable[[], Any] = GuessNumber, tasks: Sequence[Task] = (), **settings: Any) -> Any:
    """Groups of `run_episodes`; the sampler may be a function of the request's text."""
    values = {"turns": TURNS, "seed": 7, "sampling": SAMPLING, **settings}
    engine = ScriptedEngine(lambda request: sampler(text(request.prompt)), TOKENIZER) if callable(sampler) else sampler
    sampling = values.pop("sampling")
    return asyncio.run(run_episodes(engine, tasks or [guess(7)], factory, sampling, **values))


def guess(number: int, name: str = "") -> Task:
    return Task(id=name or f"guess-{number}", prompt="", facts={"number": number})


def text(tokens: Sequence[int]) -> str:
    return TOKENIZER.decode(tokens, skip_special_tokens=False)


def bisect(prompt: str) -> str:
    """Play the game well, from what stands in the prompt."""
    low, high, asked = 1, 10, None
    for line in prompt.split("<|im_start|>"):
        if line.startswith("assistant\n") and line.strip() != "assistant":
            asked = int(line.partition("\n")[2].partition("<")[0])
        if "Higher" in line and asked is not None:
            low = asked + 1
        if "Lower" in line and asked is not None:
            high = asked - 1
    return str((low + high) // 2)


# What an episode is made of


def test_an_episode_is_one_growing_list_of_tokens() -> None:
    (group,) = run(bisect)
    for trajectory in group.trajectories:
        assert text(trajectory.tokens) == (
            "<|im_start|>user\nGuess my number from 1 to 10.<|im_end|>\n<|im_start|>assistant\n5<|im_end|>"
            "\n<|im_start|>user\nHigher.<|im_end|>\n<|im_start|>assistant\n8<|im_end|>"
            "\n<|im_start|>user\nLower.<|im_end|>\n<|im_start|>assistant\n6<|im_end|>"
            "\n<|im_start|>user\nHigher.<|im_end|>\n<|im_start|>assistant\n7<|im_end|>"
        )
        spans = turn_spans(trajectory)
        assert [text(trajectory.tokens[start:end]) for start, end in spans] == [f"{n}<|im_end|>" for n in (5, 8, 6, 7)]
        assert turn_rewards(trajectory) == [0.0, 0.0, 0.0, 1.0]
        assert (trajectory.metrics["reward"], trajectory.metrics["turns"], trajectory.metrics["won"]) == (1, 4, 1)
        assert (trajectory.stop_reason, trajectory.text, trajectory.error) == (StopReason.EOS, "7", None)
        assert [message.role for message in trajectory.messages] == ["user", "assistant"] * 4 + ["user"]
        for wrote, own in zip(trajectory.mask, trajectory.policy_logprobs, strict=True):
            assert (own < 0) == wrote, "only what the policy wrote has a logprob"
    assert (group.id, group.trajectories[1].id, group.trajectories[1].index) == ("guess-7/0", "guess-7/0/1", 1)


def test_every_prompt_begins_with_all_that_went_before() -> None:
    engine = ScriptedEngine(lambda request: bisect(text(request.prompt)), TOKENIZER)
    (group,) = run(engine, sampling=Sampling(max_tokens=40, n=1))
    prompts = [request.prompt for request in engine.requests]
    (trajectory,) = group.trajectories
    for prompt, (start, _) in zip(prompts, turn_spans(trajectory), strict=True):
        assert prompt == trajectory.tokens[:start]


def test_odd_tokens_are_never_tokenised_again() -> None:
    """A sampler may split a word as no tokenizer would; the next prompt has its tokens, not the text's."""
    odd = [TOKENIZER.encode("1")[0], *TOKENIZER.encode(" "), TOKENIZER.encode("0")[0]]
    end = TOKENIZER.encode("<|im_end|>")
    sampled = (*odd, *end)
    assert TOKENIZER.encode(TOKENIZER.decode(sampled)) != list(odd) or len(odd) == 3

    class Odd:
        async def sample(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
            self.prompts = [*getattr(self, "prompts", []), *(request.prompt for request in requests)]
            return [[completion(sampled)] for _ in requests]

    sampler = Odd()
    (group,) = run(sampler, sampling=Sampling(n=1, max_tokens=9))
    first, second = sampler.prompts[:2]
    assert second[: len(first) + len(sampled)] == first + sampled
    assert group.trajectories[0].tokens[len(first) : len(first) + len(sampled)] == sampled


def completion(tokens: Sequence[int], **changes: Any) -> Completion:
    zeros = (-0.5,) * len(tokens)
    values = {
        "tokens": tuple(tokens),
        "logprobs": zeros,
        "policy_logprobs": zeros,
        "text": TOKENIZER.decode(tokens),
        "stop_reason": StopReason.EOS,
        **changes,
    }
    return Completion(**values)


def test_groups_go_through_grading_and_examples_unchanged() -> None:
    groups = run(bisect, tasks=[guess(7), guess(1)])
    grades = [asyncio.run(EpisodeReward().grade(t)) for group in groups for t in group.trajectories]
    assert [grade.score for grade in grades] == [1.0, 1.0, 1.0, 1.0]
    check_failures(groups)
    advantages = [[per_turn(t, [0.0, 0.5, -0.5, 1.0][: len(turn_spans(t))]) for t in g.trajectories] for g in groups]
    examples = to_examples(groups, advantages)
    assert len(examples) == 4
    column = examples[0].sequences[0].columns["advantages"]
    spans = turn_spans(groups[0].trajectories[0])
    assert [{column[place] for place in range(start, end)} for start, end in spans] == [{0.0}, {0.5}, {-0.5}, {1.0}]
    assert sum(value != 0 for value in column) == sum(end - start for start, end in spans[1:])


def test_rewards_of_turns_add_up() -> None:
    letters = iter("xaeppl")

    (group,) = run(
        lambda prompt: next(letters),
        factory=Hangman,
        tasks=[Task(id="w", prompt="", answer="apple")],
        sampling=Sampling(n=1, max_tokens=9),
    )
    (trajectory,) = group.trajectories
    # x misses, a 1/5, e 1/5, p 2/5, p again misses, l 1/5 and the word
    assert turn_rewards(trajectory) == pytest.approx([0, 0.2, 0.2, 0.4, 0, 1.2])
    assert trajectory.metrics["reward"] == pytest.approx(2.0)


# Limits


def test_turns_are_limited() -> None:
    (group,) = run(lambda prompt: "1", limits=EpisodeLimits(max_turns=2))
    for trajectory in group.trajectories:
        assert trajectory.stop_reason is StopReason.LENGTH
        assert not trajectory.failed()
        assert (trajectory.metrics["turns"], trajectory.metrics["clipped_turns"]) == (2, 1)


def test_tokens_are_limited_in_all() -> None:
    engine = ScriptedEngine(lambda request: "1", TOKENIZER)
    (group,) = run(engine, limits=EpisodeLimits(max_tokens=60, max_turns=50))
    for trajectory in group.trajectories:
        assert (trajectory.stop_reason, trajectory.metrics["clipped_tokens"]) == (StopReason.LENGTH, 1)
        assert len(trajectory.tokens) <= 60, "an answer that does not fit is not read"
    assert all(len(request.prompt) + request.sampling.max_tokens <= 60 for request in engine.requests)


def test_a_turn_that_is_cut_off_is_not_shown_to_the_environment() -> None:
    (group,) = run(lambda prompt: "7 " * 50)
    (first, _) = group.trajectories
    assert first.metrics["reward"] == 0.0, "it named the number, but did not end its turn"
    assert (first.stop_reason, first.num_completion_tokens()) == (StopReason.LENGTH, 40)


def test_an_opening_too_long_is_a_failure_with_its_reason() -> None:
    (group,) = run(lambda prompt: "1", limits=EpisodeLimits(max_tokens=10))
    assert "at most 10" in (group.trajectories[0].error or "")


def test_late_episodes_fail_and_others_do_not() -> None:
    class Slow(GuessNumber):
        async def step(self, action: Message) -> StepResult:
            if self._number == 3:
                await asyncio.sleep(30)
            return await super().step(action)

    slow, fast = run(bisect, factory=Slow, tasks=[guess(3), guess(5)], limits=EpisodeLimits(seconds=0.4))
    assert {t.stop_reason for t in slow.trajectories} == {StopReason.TIMEOUT}
    assert slow.trajectories[0].error == "the episode was not over after 0.4 s"
    assert len(turn_spans(slow.trajectories[0])) == 1, "what was sampled is kept"
    assert {t.metrics["reward"] for t in fast.trajectories} == {1.0}


# Failures are data


class Broken(GuessNumber):
    """Fails where it is told to, and counts how often it is closed."""

    closed: list[str] = []

    def __init__(self, where: str = "") -> None:
        super().__init__()
        self.where = where

    async def reset(self, task: Task) -> Sequence[Message]:
        if self.where == "reset":
            raise OSError("no disk")
        return await super().reset(task)

    async def step(self, action: Message) -> StepResult:
        if self.where == "step":
            raise ZeroDivisionError("by zero")
        if self.where == "silent":
            return StepResult()
        return await super().step(action)

    async def close(self) -> None:
        self.closed.append(self.where)
        if self.where == "close":
            raise RuntimeError("stuck")


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("reset", "environment: OSError: no disk"),
        ("step", "environment: ZeroDivisionError: by zero"),
        ("silent", "environment: a step gave no messages, and the episode is not over"),
    ],
)
@pytest.mark.parametrize("lockstep", [False, True])
def test_an_environment_that_fails(where: str, error: str, lockstep: bool) -> None:
    Broken.closed.clear()
    made = iter([where, "", "", ""])
    one, other = run(bisect, factory=lambda: Broken(next(made)), tasks=[guess(7), guess(4)], lockstep=lockstep)
    assert (one.trajectories[0].stop_reason, one.trajectories[0].error) == (StopReason.ERROR, error)
    assert {t.metrics["reward"] for t in (one.trajectories[1], *other.trajectories)} == {1.0}
    assert sorted(Broken.closed) == sorted([where, "", "", ""]), "each was closed exactly once"


def test_closing_may_fail() -> None:
    (group,) = run(bisect, factory=lambda: Broken("close"))
    assert group.trajectories[0].metrics["reward"] == 1.0
    assert group.trajectories[0].metrics["environment/close_failed"] == 1.0


def test_a_factory_that_raises_is_a_failure() -> None:
    def factory() -> GuessNumber:
        raise LookupError("nothing there")

    (group,) = run(bisect, factory=factory)
    assert [t.error for t in group.trajectories] == ["environment: LookupError: nothing there"] * 2


class Failing:
    """A sampler that fails from its second call on, in the way it is told."""

    def __init__(self, how: str) -> None:
        self.how, self.num_calls = how, 0

    async def sample(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        self.num_calls += 1
        good = [[completion(TOKENIZER.encode("1<|im_end|>"))] * request.sampling.n for request in requests]
        if self.num_calls == 1:
            return good
        if self.how == "raise":
            raise EngineError("no slot is large enough")
        bad = completion((), stop_reason=StopReason.ERROR, error="NaN")
        short = completion(TOKENIZER.encode("12345"), logprobs=(-1.0,))
        return [[bad if self.how == "error" else short]] * len(requests)


@pytest.mark.parametrize(
    ("how", "error"), [("raise", "EngineError: no slot"), ("error", "NaN"), ("short", "tokens, 1 logprobs")]
)
def test_a_sampler_that_fails(how: str, error: str) -> None:
    (group,) = run(Failing(how))
    for trajectory in group.trajectories:
        assert trajectory.stop_reason is StopReason.ERROR
        assert error in (trajectory.error or "")
        assert len(turn_spans(trajectory)) == 1


def test_misuse_is_raised() -> None:
    with pytest.raises(UsageError, match="comes twice"):
        run(bisect, tasks=[guess(1, "a"), guess(2, "a")])
    with pytest.raises(UsageError, match="above 0"):
        run(bisect, concurrency=0)

    class Misused(GuessNumber):
        async def reset(self, task: Task) -> Sequence[Message]:
            raise UsageError("give it a number")

    with pytest.raises(UsageError, match="give it a number"):
        run(bisect, factory=Misused)


# Seeds and order


class Seeded:
    """Guesses from the request's seed; keeps the ids of every call."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    async def sample(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        self.calls.append([request.id for request in requests])
        await asyncio.sleep(0.001)
        return [
            [
                completion(TOKENIZER.encode(f"{((request.sampling.seed or 0) + index) % 10 + 1}<|im_end|>"))
                for index in range(request.sampling.n)
            ]
            for request in requests
        ]


class Waiting(GuessNumber):
    """Takes some time, another in every episode."""

    async def step(self, action: Message) -> StepResult:
        await asyncio.sleep(0.002 * (self._number % 3))
        return await super().step(action)


def tokens_of(groups: Sequence[Group]) -> dict[str, tuple[int, ...]]:
    return {t.id: t.tokens for group in groups for t in group.trajectories}


def test_samples_depend_on_seed_step_task_and_turn_alone() -> None:
    tasks = [guess(number) for number in (2, 3, 9)]
    whole = tokens_of(run(Seeded(), factory=Waiting, tasks=tasks))
    for settings in ({"concurrency": 1}, {"lockstep": True}, {"lockstep": True, "concurrency": 2}):
        assert tokens_of(run(Seeded(), factory=Waiting, tasks=tasks[::-1], **settings)) == whole
    other = tokens_of(run(Seeded(), factory=Waiting, tasks=tasks, seed=8))
    assert other != whole
    assert len(set(whole.values())) > 3, "siblings differ"


def test_lockstep_gives_whole_batches_in_one_order() -> None:
    tasks = [guess(number) for number in (2, 5, 9, 10)]
    one, two = Seeded(), Seeded()
    run(one, factory=Waiting, tasks=tasks, lockstep=True)
    run(two, factory=Waiting, tasks=tasks[::-1], lockstep=True)
    assert one.calls == two.calls, "the same batches, however long anything took"
    assert len(one.calls) <= 4, "a call for each turn"
    assert len(one.calls[0]) == 4, "siblings share a request for their first turn"


def test_lockstep_with_few_places_never_stands_still() -> None:
    tasks = [guess(number, f"t{number}") for number in range(1, 11)]
    groups = run(bisect, factory=Waiting, tasks=tasks, lockstep=True, concurrency=3)
    assert [group.task.id for group in groups] == [task.id for task in tasks]
    assert {t.metrics["reward"] for group in groups for t in group.trajectories} == {1.0}


def test_a_refused_request_does_not_take_the_batch_along() -> None:
    class Refusing(Seeded):
        async def sample(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
            if any("bad" in request.id for request in requests):
                raise EngineError("too long")
            return await super().sample(requests)

    good, bad = run(Lockstep(Refusing()), tasks=[guess(3, "good"), guess(3, "bad")])
    assert not any(t.failed() for t in good.trajectories)
    assert [t.error for t in bad.trajectories] == ["sampler: EngineError: too long"] * 2


def test_hundreds_of_episodes_at_once() -> None:
    tasks = [guess(number % 10 + 1, f"task-{number}") for number in range(100)]
    groups = run(bisect, tasks=tasks, sampling=Sampling(n=4, max_tokens=9))
    assert sum(t.metrics["reward"] for group in groups for t in group.trajectories) == 400


def test_chance_is_the_same_for_siblings() -> None:
    drawn: list[int] = []

    class Drawn(GuessNumber):
        def seed(self, seed: int) -> None:
            super().seed(seed)
            drawn.append(self._number)

    run(bisect, factory=Drawn, tasks=[Task(id=name, prompt="") for name in "abcdef"])
    assert drawn[::2] == drawn[1::2]
    assert len(set(drawn)) > 1


# Metrics


def test_metrics_by_hand() -> None:
    def trajectory(index: int, turns: int, own: int, **metrics: float) -> Trajectory:
        size = 3 + own
        return Trajectory(
            id=f"a/0/{index}",
            task=guess(1, "a"),
            tokens=(1,) * size,
            mask=(False,) * 3 + (True,) * own,
            logprobs=(0.0,) * size,
            policy_logprobs=(0.0,) * size,
            text="",
            stop_reason=StopReason.EOS if index else StopReason.LENGTH,
            metrics={"turns": turns, "reward": 1.0, "turn/0/reward": 1.0, **metrics},
        )

    group = Group(
        task=guess(1, "a"),
        trajectories=(
            trajectory(0, 2, 4, **{"tools/calls": 3, "tools/failures": 1, "won": 1}),
            trajectory(1, 4, 8, **{"tools/calls": 1, "tools/malformed": 1}),
            trajectory(2, 9, 9).replace(stop_reason=StopReason.ERROR, error="x"),
        ),
    )
    assert episode_metrics([group]) == {
        "episodes/mean_turns": 3.0,
        "episodes/max_turns": 4.0,
        "episodes/clipped_ratio": 0.5,
        "episodes/read_tokens": 3.0,
        "tools/call_frequency": 2.0,
        "tools/failure_frequency": 0.25,
        "tools/malformed_frequency": 0.5,
        "environment/won": 0.5,
    }


def test_a_message_that_a_template_does_not_show_is_a_failure() -> None:
    class Mute(GuessNumber):
        async def step(self, action: Message) -> StepResult:
            return StepResult(messages=(Message(role="system", content="psst"), user("on")))

    silent = "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    silent += "{% if add_generation_prompt %}[assistant]{% endif %}"
    (group,) = run(lambda prompt: "1", factory=Mute, turns=TurnTokens(Renderer(TOKENIZER, silent)))
    assert "does not show a system's message" in (group.trajectories[0].error or "")
