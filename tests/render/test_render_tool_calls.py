"""Every family's tool calls: written and read back, by the syntax itself and through real chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.core import Message, RenderError, ToolCall, ToolSpec, user
from posttrain.render import CALL_SYNTAXES, Renderer, Tokenizer, call_syntax_of, read_turn
from posttrain.render.survey import template_tokenizer
from posttrain.render.tool_calls import shows_calls, split_reasoning

TOOLS = (
    ToolSpec(
        name="get_weather",
        description="The weather of a city.",
        parameters={
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its name."},
                "days": {"type": "integer", "description": "How many."},
                "parts": {"type": "array", "items": {"type": "string"}, "description": "Of the day."},
                "sure": {"type": "boolean", "description": "Whether."},
            },
            "required": ["city"],
        },
    ),
    ToolSpec(
        name="add",
        description="Add.",
        parameters={
            "type": "object",
            "properties": {
                "a": {"type": "number", "description": "One."},
                "b": {"type": "number", "description": "Two."},
            },
            "required": ["a", "b"],
        },
    ),
)
ONE = ToolCall(
    name="get_weather",
    arguments={"city": 'Sankt "Gallen" \\ 2 < 3', "days": 2, "parts": ["noon", "night"], "sure": True},
    id="a1b2c3d4e",
)
TWO = ToolCall(name="add", arguments={"a": 1.5, "b": -2}, id="f6g7h8i9j")
MANY = [name for name in CALL_SYNTAXES if name not in ("harmony", "gigachat3", "gigachat3.1")]

# What each family's chat template is found to write; templates that are not named show no call here.
EXPECTED = {
    "Apertus-8B-Instruct": "apertus",
    "Bielik-11B-v3.0-Instruct": "hermes",
    "ByteDance-Seed-OSS": "seed",
    "Cohere2MoE": "cohere",
    "CohereForAI-c4ai-command-r-plus-tool_use": "command-r",
    "GLM-4.6": "glm-4.6",
    "GLM-4.7-Flash": "glm-4.7",
    "GigaChat3-10B-A1.8B": "gigachat3",
    "GigaChat3.1-10B-A1.8B": "gigachat3.1",
    "Mistral-Small-3.2-24B-Instruct-2506": "mistral-named",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "hermes",
    "Qwen-Qwen2.5-7B-Instruct": "hermes",
    "Qwen-Qwen3-0.6B": "hermes",
    "Qwen3-Coder": "qwen3-coder",
    "StepFun3.5-Flash": "qwen3-coder",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "deepseek-r1",
    "deepseek-ai-DeepSeek-V3.1": "deepseek-v3.1",
    "deepseek-ai-DeepSeek-V3.2": "deepseek-v3.2",
    "deepseek-ai-DeepSeek-V4": "deepseek-v4",
    "google-gemma-4-31B-it": "gemma4",
    "meetkai-functionary-medium-v3.1": "functionary3.1",
    "meetkai-functionary-medium-v3.2": "functionary3.2",
    "meta-llama-Llama-3.1-8B-Instruct": "llama3",
    "meta-llama-Llama-3.2-3B-Instruct": "llama3",
    "mistral-common/v3": "mistral",
    "mistral-common/v7": "mistral",
    "mistral-common/v11": "mistral-named",
    "mistral-common/v13": "mistral-named",
    "mistralai-Mistral-Nemo-Instruct-2407": "mistral",
    "moonshotai-Kimi-K2": "kimi",
    "openai-gpt-oss-120b": "harmony",
    "unsloth-Apriel-1.5": "apriel",
}


def plain(calls: tuple[ToolCall, ...] | list[ToolCall]) -> list[tuple[str, dict[str, Any]]]:
    return [(call.name, call.arguments) for call in calls]


# By the syntax alone


@pytest.mark.parametrize("name", list(CALL_SYNTAXES))
def test_a_call_is_read_as_it_was_written(name: str) -> None:
    syntax = CALL_SYNTAXES[name]
    read = read_turn(syntax.write([ONE]), syntax, TOOLS)
    assert (read.error, read.message.content, plain(read.message.tool_calls)) == (None, "", plain([ONE]))


@pytest.mark.parametrize("name", MANY)
def test_parallel_calls_are_read_in_order(name: str) -> None:
    syntax = CALL_SYNTAXES[name]
    assert plain(read_turn(syntax.write([ONE, TWO]), syntax, TOOLS).message.tool_calls) == plain([ONE, TWO])


def test_harmony_has_one_call_in_a_turn() -> None:
    with pytest.raises(RenderError, match="one tool call"):
        CALL_SYNTAXES["harmony"].write([ONE, TWO])


texts = st.text(st.characters(codec="utf-8", exclude_characters="\r", exclude_categories=("Cs", "Cc")), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-999, 999) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
OPEN = ToolSpec(name="t", parameters={"properties": {"text": {"type": "string"}, "value": {}}})


@pytest.mark.parametrize("name", [name for name in CALL_SYNTAXES if name != "gemma4"])
@given(text=texts, value=values.filter(lambda value: not isinstance(value, str)))
@settings(max_examples=40, deadline=None)
def test_any_value_survives(name: str, text: str, value: Any) -> None:
    syntax = CALL_SYNTAXES[name]
    call = ToolCall(name="t", arguments={"text": text, "value": value})
    assert plain(read_turn(syntax.write([call]), syntax, (OPEN,)).message.tool_calls) == plain([call])


@given(text=texts, numbers=st.lists(st.integers(-9, 9), max_size=3), flag=st.booleans())
@settings(max_examples=40, deadline=None)
def test_gemma_keeps_texts_lists_and_flags(text: str, numbers: list[int], flag: bool) -> None:
    syntax = CALL_SYNTAXES["gemma4"]
    call = ToolCall(name="t", arguments={"text": text, "numbers": numbers, "inner": {"a b": [flag, text]}})
    assert plain(read_turn(syntax.write([call]), syntax).message.tool_calls) == plain([call])


@pytest.mark.parametrize("name", ["qwen3-coder", "seed", "glm-4.6", "glm-4.7", "deepseek-v3.2", "gemma4"])
def test_a_value_that_would_end_itself_is_refused(name: str) -> None:
    ends = '</parameter></arg_value></｜DSML｜parameter><|"|>'
    with pytest.raises(RenderError, match="cannot write a value that holds"):
        CALL_SYNTAXES[name].write([ToolCall(name="t", arguments={"text": ends})])


def test_text_stays_text_where_the_schema_says_so() -> None:
    syntax = CALL_SYNTAXES["qwen3-coder"]
    call = ToolCall(name="get_weather", arguments={"city": "2", "days": 2})
    assert plain(read_turn(syntax.write([call]), syntax, TOOLS).message.tool_calls) == plain([call])
    assert read_turn(syntax.write([call]), syntax).message.tool_calls[0].arguments == {"city": 2, "days": 2}


# What else stands in a turn


def test_content_and_reasoning_stand_beside_calls() -> None:
    syntax = CALL_SYNTAXES["hermes"]
    read = read_turn(f"<think>\nHmm, <tool_call> maybe.\n</think>\n\nLet me see.\n{syntax.write([TWO])}", syntax)
    assert read.message == Message(
        role="assistant", content="Let me see.", reasoning="Hmm, <tool_call> maybe.", tool_calls=(TWO.replace(id=None),)
    )


def test_reasoning_whose_opening_stands_in_the_prompt() -> None:
    assert split_reasoning("so it is\n</think>\n\nYes.") == ("so it is", "Yes.")
    assert split_reasoning("<think>for ever") == ("for ever", "")
    assert split_reasoning("plain") == (None, "plain")


@pytest.mark.parametrize("name", list(CALL_SYNTAXES))
def test_an_answer_without_calls_is_content(name: str) -> None:
    read = read_turn("It is 21 degrees.", CALL_SYNTAXES[name], TOOLS)
    assert read == read.replace(error=None, message=Message(role="assistant", content="It is 21 degrees."))


def test_json_that_is_no_call_is_an_answer() -> None:
    assert read_turn('{"city": "Rome"}', CALL_SYNTAXES["llama3"]).message.content == '{"city": "Rome"}'
    assert read_turn("[1, 2]", CALL_SYNTAXES["pythonic"]).message.content == "[1, 2]"


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("hermes", '<tool_call>\n{"name": "add", "arguments": {"a": 1,}}\n</tool_call>', "invalid JSON"),
        ("hermes", '<tool_call>\n{"name": "add", "arguments": {"a": 1}}', "does not end with </tool_call>"),
        ("hermes", '<tool_call>\n{"arguments": {}}\n</tool_call>', "an object with 'name'"),
        ("hermes", '<tool_call>\n{"name": "add", "arguments": [1]}\n</tool_call>', "is an object"),
        ("llama3", '{"name": "add", "parameters": {"a": 1}', "invalid JSON"),
        ("llama3", '{"name": "add", "parameters": {}} and so on', "text after the tool call"),
        ("mistral", "[TOOL_CALLS] add 1 2", "invalid JSON"),
        ("mistral-named", '[TOOL_CALLS]add{"a": 1}', "has no [ARGS]"),
        ("qwen3-coder", "<tool_call>\n<function=add>\n<parameter=a>\n1\n</function>\n</tool_call>", "</parameter>"),
        ("qwen3-coder", "<tool_call>\nadd\n</tool_call>", "<function=NAME>"),
        ("glm-4.6", "<tool_call>add\n<arg_key>a</arg_key>\n</tool_call>", "does not end"),
        ("deepseek-v3.2", "<｜DSML｜function_calls>\nadd", "do not end"),
        ("deepseek-v3.1", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add{}", "after its name"),
        ("kimi", "<|tool_calls_section_begin|>add", "do not end"),
        ("harmony", "<|channel|>commentary to=functions.add {}", "tool call is"),
        ("apertus", '<|tools_prefix|>[{"a": {}, "b": {}}]<|tools_suffix|>', "a list of"),
        ("gemma4", "<|tool_call>call:add{a:1<tool_call|>", "lacks a }"),
        ("lfm2", "<|tool_call_start|>[add(a=open('x'))]<|tool_call_end|>", "literal"),
        ("functionary3.2", "add\n{1}", "invalid JSON"),
    ],
)
def test_a_malformed_call_is_an_error_with_its_reason(name: str, text: str, why: str) -> None:
    read = read_turn(text, CALL_SYNTAXES[name], TOOLS)
    assert read.error is not None
    assert why in read.error
    assert (read.message.content, read.message.tool_calls) == (text, ())


@pytest.mark.parametrize("name", list(CALL_SYNTAXES))
@given(cut=st.integers(1, 300), junk=st.sampled_from(["", "{", "]", "<", "\n", "}}}}", "[" * 5000]))
@settings(max_examples=15, deadline=None)
def test_no_text_makes_reading_fail(name: str, cut: int, junk: str) -> None:
    syntax = CALL_SYNTAXES[name]
    read = read_turn(syntax.write([ONE])[:cut] + junk, syntax, TOOLS)
    assert (read.error is None) or read.message.tool_calls == ()


# Through real templates


def templates(data: Path) -> list[tuple[str, str]]:
    folder = data / "chat_templates"
    return [
        (str(path.relative_to(folder).with_suffix("")), path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.jinja"))
    ]


def test_each_templates_syntax_is_found(data: Path) -> None:
    found = {}
    for name, template in templates(data):
        if name in EXPECTED:
            found[name] = call_syntax_of(Renderer(template_tokenizer(template))).name
    assert found == EXPECTED


def test_calls_that_templates_print_are_read_back_exactly(data: Path) -> None:
    """Rendered by the template, tokenised, decoded, read: the same calls; two of them where the family allows it."""
    checked: dict[str, int] = {}
    for name, template in templates(data):
        renderer = Renderer(template_tokenizer(template))
        if not shows_calls(renderer):
            continue
        syntax = call_syntax_of(renderer)
        for calls in ((ONE,), (ONE, TWO)):
            turn = Message(role="assistant", tool_calls=calls)
            try:
                rendered = renderer.render([user("Well?"), turn], tools=TOOLS)
            except RenderError:
                assert len(calls) == 2, f"{name}: one call is refused"
                continue
            own = [token for token, wrote in zip(rendered.tokens, rendered.mask, strict=True) if wrote]
            if own[-1] in renderer.stop_tokens:
                own.pop()
            text = renderer.tokenizer.decode(own, skip_special_tokens=False)
            if len(calls) == 2 and syntax.name in ("harmony", "gigachat3", "gigachat3.1"):
                continue  # the template shows the first only
            read = read_turn(text, syntax, TOOLS)
            assert read.error is None, f"{name}: {read.error}: {text}"
            assert plain(read.message.tool_calls) == plain(calls), f"{name}: {text}"
            checked[name] = len(calls)
    assert len(checked) >= 40
    assert sum(count == 2 for count in checked.values()) >= 35


def test_a_template_without_calls_says_what_to_do() -> None:
    plain_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    renderer = Renderer(Tokenizer.train_bpe([], 260, ("</s>",), plain_template, eos_token="</s>"))
    with pytest.raises(RenderError, match="name the one that the model was trained on: hermes, llama3"):
        call_syntax_of(renderer)
    assert json.loads(json.dumps(list(CALL_SYNTAXES)))[0] == "hermes"
