from __future__ import annotations

from typing import Any

import pytest

from posttrain.core import Message, ToolCall, ToolSpec, assistant, system, user
from posttrain.data.chat import parse_messages, parse_tools
from posttrain.data.rows import RowFault

CALL = ToolCall(name="weather", arguments={"city": "Zürich"})


def parse(*turns: Any) -> tuple[Message, ...]:
    return parse_messages(list(turns), "messages")


def fault(*turns: Any) -> str:
    with pytest.raises(RowFault) as caught:
        parse(*turns)
    assert caught.value.field == "messages"
    return caught.value.cause


U = {"role": "user", "content": "hi"}
A = {"role": "assistant", "content": "yo"}


def test_openai_messages_with_tool_calls() -> None:
    tool = {"role": "tool", "content": "12 °C", "tool_call_id": "c1", "name": "weather"}
    expected = (
        system("be brief"),
        user("hi"),
        Message(role="assistant", tool_calls=(CALL.replace(id="c1"),)),
        Message(role="tool", content="12 °C", tool_call_id="c1", name="weather"),
        assistant("yo"),
    )
    for arguments in ('{"city": "Z\\u00fcrich"}', {"city": "Zürich"}):
        call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        calling = {"role": "assistant", "content": None, "tool_calls": [call]}
        assert parse({"role": "system", "content": "be brief"}, U, calling, tool, A) == expected
    flat = {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": {"city": "Zürich"}}]}
    assert parse(U, flat)[1].tool_calls == (CALL,)
    legacy = {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": ""}}
    assert parse(U, legacy)[1].tool_calls == (ToolCall(name="weather"),)


def test_sharegpt_turns() -> None:
    call = '{"name": "weather", "arguments": {"city": "Zürich"}}'
    found = parse(
        {"from": "system", "value": ""},
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "let me see"},
        {"from": "function_call", "value": call},
        {"from": "function_call", "value": call},
        {"from": "observation", "value": "{}"},
        {"from": "observation", "value": ""},
        {"from": "gpt", "value": "yo"},
    )
    assert found == (
        user("hi"),
        Message(role="assistant", content="let me see", tool_calls=(CALL, CALL)),
        Message(role="tool", content="{}"),
        Message(role="tool", content=""),
        assistant("yo"),
    )


def test_content_parts() -> None:
    parts = [{"type": "reasoning", "value": "hm"}, {"type": "text", "text": "a"}, {"type": "text", "value": "b"}]
    assert parse(U, {"role": "assistant", "content": parts})[1] == Message(
        role="assistant", content="ab", reasoning="hm"
    )
    called = [{"type": "tool_call", "value": '{"name": "weather", "arguments": {"city": "Zürich"}}'}]
    assert parse(U, {"role": "assistant", "content": called})[1].tool_calls == (CALL,)
    thought = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    assert parse(U, thought)[1].reasoning == "hm"
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    assert fault(picture, A) == "has a content part that is not text"
    assert fault({"role": "user", "content": [{"text": "a"}]}, A) == "has a content part without type"
    assert fault({"role": "user", "content": [{"type": "text", "text": 3}]}, A) == "has a content part without text"


def test_training_weights() -> None:
    assert [m.train for m in parse(U, {**A, "weight": 0}, U, {**A, "weight": 1}, U, {**A, "train": False})] == [
        True,
        False,
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("turns", "cause"),
    [
        ([A, U], "has roles in a nonsensical order"),
        ([U, U], "has roles in a nonsensical order"),
        ([U, A, A], "has roles in a nonsensical order"),
        ([U, A, {"role": "system", "content": "s"}], "has a system turn after the conversation began"),
        ([U, {"role": "tool", "content": "x"}], "has a tool result without a tool call"),
        ([U, A, {"role": "tool", "content": "x"}], "has a tool result without a tool call"),
        ([{"role": "system", "content": "s"}], "has no user turn"),
        ([], "has no messages"),
        ([U, "yo"], "has a message that is not an object"),
        ([U, {"content": "yo"}], "has a message without role"),
        ([U, {"role": "teacher", "content": "yo"}], "has an unknown role"),
        ([U, {"role": "assistant", "content": " \n"}], "has an empty assistant turn"),
        ([U, {"role": "assistant", "content": None}], "has an empty assistant turn"),
        ([{"role": "user", "content": ""}, A], "has an empty user turn"),
        ([U, {"role": "assistant", "content": 3}], "has content that is neither text nor parts"),
        ([U, {**A, "name": 3}], "has a name that is not text"),
        ([U, {**A, "tool_calls": [3]}], "has a tool call that is not an object"),
        ([U, {**A, "tool_calls": [{"arguments": {}}]}], "has a tool call without name"),
        ([U, {**A, "tool_calls": [{"name": "f", "arguments": "{"}]}], "has text that should be JSON and is not"),
        ([U, {**A, "tool_calls": [{"name": "f", "arguments": [1]}]}], "has tool call arguments that are not an object"),
        ([{**U, "tool_calls": [{"name": "f"}]}, A], "has tool calls in a turn that is not the assistant's"),
        ([U, {"from": "function_call", "value": "weather()"}], "has text that should be JSON and is not"),
    ],
)
def test_faults(turns: list[Any], cause: str) -> None:
    assert fault(*turns) == cause


def test_messages_as_json_text_and_other_types() -> None:
    assert parse_messages('[{"role": "user", "content": "hi"}]', "messages") == (user("hi"),)
    for wrong in (3, None, "hi"):
        with pytest.raises(RowFault):
            parse_messages(wrong, "messages")


def test_tools() -> None:
    bare = {"name": "weather", "description": "of a city", "parameters": {"type": "object"}, "strict": True}
    spec = ToolSpec(name="weather", description="of a city", parameters={"type": "object"})
    text = '[{"name": "weather", "description": "of a city", "parameters": {"type": "object"}}]'
    for form in ([bare], bare, [{"type": "function", "function": bare}], text):
        assert parse_tools(form) == (spec,)
    for nothing in (None, "", [], "[]"):
        assert parse_tools(nothing) == ()
    for wrong in ("{", [{"description": "x"}], [{"name": "f", "parameters": []}], 3, [3]):
        with pytest.raises(RowFault) as caught:
            parse_tools(wrong)
        assert caught.value.field == "tools"
