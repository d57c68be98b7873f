"""Tools: schemas from signatures, checked arguments, outcomes that are told, and episodes in every family's syntax."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Sequence
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest

from posttrain.core import (
    Completion,
    ConfigError,
    Message,
    RenderError,
    SampleRequest,
    Sampling,
    StepResult,
    StopReason,
    Task,
    ToolCall,
    user,
)
from posttrain.engine import ScriptedEngine
from posttrain.render import CALL_SYNTAXES, Renderer, Tokenizer, call_syntax_of
from posttrain.render.survey import template_tokenizer
from posttrain.rollout import (
    EpisodeLimits,
    FunctionTool,
    GuessNumber,
    ToolAnswer,
    Toolbox,
    ToolEnvironment,
    TurnTokens,
    run_episodes,
    turn_spans,
)

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "chat_templates"


class Unit(Enum):
    CELSIUS = "celsius"
    KELVIN = "kelvin"


class Place(msgspec.Struct):
    """Where."""

    city: str
    country: str = "CH"


def weather(city: str, days: int = 1, unit: Unit = Unit.CELSIUS, kind: Literal["short", "long"] | None = None) -> str:
    """The weather of a city,
    for some days.

    More that the model need not read.

    Args:
        city: its name,
            as people write it.
        days: how many.
    """
    return f"{city}: {days} days, {unit.value}, {kind}"


def add(a: float, b: float) -> float:
    """Add."""
    return a + b


async def later(text: str) -> str:
    """Say it later."""
    await asyncio.sleep(0)
    return text


def call(function: Any, **arguments: Any) -> Any:
    return asyncio.run(Toolbox([function]).call(ToolCall(name=function.__name__, arguments=arguments, id="call00001")))


# Schemas


def test_the_schema_comes_from_signature_and_docstring() -> None:
    spec = FunctionTool(weather).spec
    assert (spec.name, spec.description) == ("weather", "The weather of a city, for some days.")
    properties = spec.parameters["properties"]
    assert properties["city"] == {"description": "its name, as people write it.", "type": "string"}
    assert properties["days"] == {"description": "how many.", "type": "integer", "default": 1}
    assert {"type": "null"} in properties["kind"]["anyOf"]
    assert spec.parameters["$defs"]["Unit"]["enum"] == ["celsius", "kelvin"]
    assert (spec.parameters["type"], spec.parameters["required"]) == ("object", ["city"])


def test_methods_and_records_are_fine() -> None:
    class Travel:
        def go(self, to: Place, stops: list[Place] = []) -> str:  # noqa: B006  the tool copies it
            """Go."""
            return f"{to.city} {to.country} {len(stops)}"

    tool = FunctionTool(Travel().go)
    assert "self" not in tool.spec.parameters["properties"]
    assert tool.spec.parameters["$defs"]["Place"]["required"] == ["city"]
    assert asyncio.run(tool.call({"to": {"city": "Bern"}, "stops": [{"city": "Thun"}]})) == "Bern CH 1"


@pytest.mark.parametrize("bad", [lambda x: x, lambda *xs: xs])
def test_an_untyped_function_is_refused(bad: Any) -> None:
    with pytest.raises(ConfigError, match=r"give its parameter|cannot be given by name"):
        FunctionTool(bad)


def test_a_type_without_schema_is_refused() -> None:
    def odd(what: object, how: set[Toolbox]) -> str:
        return ""

    with pytest.raises(ConfigError, match="no JSON schema"):
        FunctionTool(odd)


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="two tools of the name 'add'"):
        Toolbox([add, FunctionTool(later, name="add")])


# Calls


def test_results_are_text_or_json() -> None:
    assert call(weather, city="Rome", days=2, unit="kelvin").message.content == "Rome: 2 days, kelvin, None"
    assert call(add, a=1, b=2.5).message.content == "3.5"
    outcome = call(later, text="soon")
    assert outcome.message == Message(role="tool", content="soon", tool_call_id="call00001", name="later")


@pytest.mark.parametrize(
    ("function", "arguments", "told"),
    [
        (add, {"a": 1}, "missing required field `b`"),
        (add, {"a": 1, "b": "two"}, "Expected `float`, got `str` - at `$.b`"),
        (add, {"a": 1, "b": 2, "c": 3}, "unknown field `c`"),
        (weather, {"city": "Rome", "unit": "inch"}, "Invalid enum value 'inch'"),
    ],
)
def test_wrong_arguments_are_told(function: Any, arguments: dict[str, Any], told: str) -> None:
    outcome = call(function, **arguments)
    assert outcome.failed
    assert outcome.message.content.startswith(f"Error: wrong arguments for {function.__name__}: ")
    assert told in outcome.message.content


def test_exceptions_lateness_and_unknown_names_are_told() -> None:
    def fails(at: int) -> str:
        raise KeyError(at)

    async def waits() -> str:
        await asyncio.sleep(30)
        return ""

    async def own() -> str:
        raise TimeoutError("the server")

    box = Toolbox([fails, waits, own], timeout_s=0.1)
    calls = [ToolCall(name="fails", arguments={"at": 3}), ToolCall(name="waits"), ToolCall(name="own")]
    outcomes = asyncio.run(box.call_all([*calls, ToolCall(name="nothing")]))
    assert [outcome.message.content for outcome in outcomes] == [
        "Error: KeyError: 3",
        "Error: waits took longer than 0.1 s",
        "Error: TimeoutError: the server",
        "Error: there is no tool 'nothing'. Tools: fails, waits, own",
    ]
    assert all(outcome.failed for outcome in outcomes)


def test_long_results_are_cut_and_say_so() -> None:
    def much() -> str:
        """Much."""
        return "x" * 100

    outcome = asyncio.run(Toolbox([much], max_characters=10).call(ToolCall(name="much")))
    assert outcome.message.content == "xxxxxxxxxx… (90 characters more)"


def test_calls_of_one_turn_run_at_the_same_time_and_answer_in_order() -> None:
    together = threading.Barrier(3)

    def meet(name: str) -> str:
        together.wait(timeout=20)  # one after another they would never meet
        return name

    calls = [ToolCall(name="meet", arguments={"name": name}) for name in "abc"]
    outcomes = asyncio.run(Toolbox([meet], timeout_s=30).call_all(calls))
    assert [outcome.message.content for outcome in outcomes] == ["a", "b", "c"]


# In an episode


def counter() -> ToolEnvironment:
    """A counter that the policy may raise and read; it should say how far it counted."""
    state = {"n": 0}

    def up(by: int) -> str:
        """Count up.

        Args:
            by: how far.
        """
        state["n"] += by
        return "ok"

    async def total() -> ToolAnswer:
        """How far it is."""
        return ToolAnswer(text=f"total {state['n']}", reward=0.25)

    def judge(task: Task, messages: Sequence[Message]) -> float:
        return float(messages[-1].content == f"It is {state['n']}.")

    return ToolEnvironment([up, total], judge=judge, failed_reward=-0.5)


SMALL = Tokenizer.train_bpe(["Count to 5."], 280, ("<|im_end|>", "<|im_start|>"))


def play(says: list[str]) -> Any:
    """One episode in which the policy says these turns."""
    return play_with(Speaks(SMALL, "<|im_end|>", says), TurnTokens(Renderer(SMALL)))


def hermes(*calls: ToolCall) -> str:
    return CALL_SYNTAXES["hermes"].write(calls)


UP = [ToolCall(name="up", arguments={"by": by}) for by in (2, 3)]
TOTAL = ToolCall(name="total")


def test_parallel_calls_rewards_and_the_judge() -> None:
    trajectory = play([f"First.\n{hermes(*UP)}", hermes(TOTAL), "It is 5."])
    assert [
        message.role for message in trajectory.messages
    ] == "user assistant tool tool assistant tool assistant".split()
    assert [message.content for message in trajectory.messages if message.role == "tool"] == ["ok", "ok", "total 5"]
    first = trajectory.messages[1]
    assert (first.content, [call.id for call in first.tool_calls]) == ("First.", ["call00000", "call00001"])
    assert trajectory.messages[5].tool_call_id == "call00002"
    assert trajectory.metrics["reward"] == 1.25
    assert (trajectory.metrics["tools/calls"], trajectory.metrics["tools/failures"]) == (3, 0)
    own = [SMALL.decode(trajectory.tokens[start:end]) for start, end in turn_spans(trajectory)]
    assert own == [f"First.\n{hermes(*UP)}", hermes(TOTAL), "It is 5."], "results are masked, calls are not"


def test_failed_and_malformed_calls_are_answered() -> None:
    says = [hermes(UP[0].replace(arguments={"by": "x"})), '<tool_call>\n{"name": up}\n</tool_call>', "It is 0."]
    trajectory = play(says)
    failed, malformed = trajectory.messages[2], trajectory.messages[4]
    assert (failed.role, failed.content.startswith("Error: wrong arguments for up")) == ("tool", True)
    assert (malformed.role, malformed.content.startswith("Error: invalid JSON in the tool call")) == ("user", True)
    assert trajectory.metrics["reward"] == 0.5, "1 for the answer, -0.5 for the failed call"
    assert (trajectory.metrics["tools/failures"], trajectory.metrics["tools/malformed"]) == (1, 1)


def test_malformed_calls_may_cost_and_end_it() -> None:
    left = iter(["<tool_call>no"] * 9)
    (group,) = asyncio.run(
        run_episodes(
            ScriptedEngine(lambda request: next(left), SMALL),
            [Task(id="count", prompt="Count to 5.")],
            counter,
            Sampling(max_tokens=50, n=1),
            turns=TurnTokens(Renderer(SMALL)),
            seed=0,
            limits=EpisodeLimits(malformed_reward=-0.1, max_malformed=2),
        )
    )
    (trajectory,) = group.trajectories
    assert (trajectory.metrics["turns"], trajectory.metrics["reward"]) == (2, -0.2)
    assert trajectory.stop_reason is StopReason.EOS


def test_a_partner_answers_turns_without_calls() -> None:
    def make() -> ToolEnvironment:
        return ToolEnvironment([add], partner=GuessNumber(), system="Be quick.", judge=lambda task, messages: 10.0)

    left = iter(["5", hermes(ToolCall(name="add", arguments={"a": 3, "b": 4})), "7"])
    (group,) = asyncio.run(
        run_episodes(
            ScriptedEngine(lambda request: next(left), SMALL),
            [Task(id="guess", prompt="", facts={"number": 7})],
            make,
            Sampling(max_tokens=90, n=1),
            turns=TurnTokens(Renderer(SMALL)),
            seed=0,
        )
    )
    (trajectory,) = group.trajectories
    contents = [message.content for message in trajectory.messages]
    assert contents[0] == "Be quick."
    assert contents[3:] == ["Higher.", "", "7.0", "7", "Right!"]
    assert trajectory.metrics["reward"] == 11.0


def test_tools_are_freed() -> None:
    freed = []

    async def free() -> None:
        freed.append(True)

    async def once() -> StepResult:
        environment = ToolEnvironment([add], on_close=free)
        await environment.reset(Task(id="x", prompt="go"))
        result = await environment.step(Message(role="assistant", content="done"))
        await environment.close()
        return result

    assert asyncio.run(once()) == StepResult(done=True)
    assert freed == [True]


# With every family's template


class Speaks:
    """Says the turns it is given, each ended as the chat template ends it."""

    def __init__(self, tokenizer: Tokenizer, end: str, says: list[str]) -> None:
        self.tokenizer, self.end, self.says = tokenizer, end, iter(says)

    async def sample(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        (request,) = requests
        text = next(self.says)
        ids = self.tokenizer.encode(text + self.end)
        zeros = (-1.0,) * len(ids)
        stop = StopReason.EOS if ids[-1] in request.sampling.stop_tokens else StopReason.STOP
        made = Completion(tokens=tuple(ids), logprobs=zeros, policy_logprobs=zeros, text=text, stop_reason=stop)
        return [[made]]


def named() -> list[str]:
    return [str(path.relative_to(DATA).with_suffix("")) for path in sorted(DATA.rglob("*.jinja"))]


@pytest.mark.skipif(not DATA.exists(), reason=f"no chat templates at {DATA}")
def test_episodes_with_real_templates() -> None:
    """Two rounds of tools with every template that has them. The appended answers
    read as in the whole conversation rendered at once."""
    same, played, refused = [], [], {}
    for name in named():
        tokenizer = template_tokenizer((DATA / f"{name}.jinja").read_text(encoding="utf-8"))
        renderer = Renderer(tokenizer)
        try:
            syntax = call_syntax_of(renderer)
        except RenderError:
            continue
        says = [syntax.write([UP[0]]), syntax.write([TOTAL]), "It is 2."]
        if syntax.name == "functionary3.2":
            says[-1] = "all\n" + says[-1]
        end = renderer.end_text(True)
        trajectory = play_with(Speaks(tokenizer, end, says), TurnTokens(renderer))
        if trajectory.failed():
            refused[name] = trajectory.error or ""
            continue
        assert trajectory.metrics["reward"] == 1.25, f"{name}: {trajectory.messages}"
        shown = tokenizer.decode(trajectory.tokens, skip_special_tokens=False)
        for expected in ("Count to 5.", "ok", "total 2", "It is 2."):
            assert expected in shown, f"{name} lacks {expected!r}"
        played.append(name)
        try:
            whole = renderer.render(trajectory.messages[:-1], tools=counter().tools, add_generation_prompt=True)
        except RenderError:
            continue
        spans = turn_spans(trajectory)
        answers = [trajectory.tokens[end:start] for (_, end), (start, _) in pairwise(spans)]
        if all(tokenizer.decode(answer, skip_special_tokens=False) in whole.text for answer in answers):
            same.append(name)
    assert len(played) >= 50
    # Others open the next turn's reasoning, or leave out a line break, only where the next turn is still to come: that
    # is how the sampler was asked.
    assert len(same) >= 35
    assert {"Qwen-Qwen2.5-7B-Instruct", "meta-llama-Llama-3.1-8B-Instruct", "mistral-common/v7"} <= set(same)
    # Whoever is refused is told why: the template's turns cannot be told apart, or it does not render at all.
    reasons = r"cannot be told|refuses these messages|sandbox forbids"
    assert all(re.search(reasons, error) for error in refused.values()), refused


def play_with(sampler: Any, turns: TurnTokens) -> Any:
    (group,) = asyncio.run(
        run_episodes(
            sampler,
            [Task(id="count", prompt="Count to 5.")],
            counter,
            Sampling(max_tokens=400, n=1),
            turns=turns,
            seed=0,
            limits=EpisodeLimits(max_tokens=20_000),
        )
    )
    return group.trajectories[0]


@pytest.mark.skipif(not DATA.exists(), reason=f"no chat templates at {DATA}")
def test_templates_that_rewrite_are_refused_or_kept_as_one_likes() -> None:
    tokenizer = template_tokenizer((DATA / "Qwen-Qwen3-0.6B.jinja").read_text(encoding="utf-8"))
    renderer = Renderer(tokenizer)
    hermes_syntax = CALL_SYNTAXES["hermes"]
    thought = "<think>\nHmm, 2.\n</think>\n\n"
    says = [thought + hermes_syntax.write([UP[0]]), thought + "It is 2."]
    end = renderer.end_text(True)
    kept = play_with(Speaks(tokenizer, end, says), TurnTokens(renderer, rewritten="refuse"))
    assert kept.metrics["reward"] == 1.0, "this template keeps its reasoning between a tool's answers"
    assert tokenizer.decode(kept.tokens).count("Hmm, 2.") == 2
    assert "sampled as '<think>" in TurnTokens(renderer).rewrites(), "but not once a user speaks"
    with pytest.raises(RenderError, match="rewrites earlier turns"):
        TurnTokens(renderer, rewritten="refuse").opening([user("Hello.")])
    assert TurnTokens(renderer).opening([user("Hello.")]) == renderer.prompt([user("Hello.")])
    assert TurnTokens(Renderer(SMALL), rewritten="refuse").opening([user("Hello.")])
