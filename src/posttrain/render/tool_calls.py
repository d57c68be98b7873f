"""Read an assistant's turn: what it thought, what it said, and the tools it calls, in the syntax of its family."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from posttrain.core import Message, Record, RenderError, ToolCall, ToolSpec
from posttrain.render.renderer import Renderer
from posttrain.render.tool_calls_json import JSON_SYNTAXES, MalformedCall
from posttrain.render.tool_calls_tagged import TAGGED_SYNTAXES

# What families put around an assistant's reasoning. The prompt may have opened it already.
_THOUGHTS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
)
# Marks around what is said to the user.
_ANSWER_MARKS = re.compile(
    r"<\|START_(?:RESPONSE|TEXT)\|>|<\|END_(?:RESPONSE|TEXT)\|>|<\|channel\|>(?:final|commentary)<\|message\|>"
)
_PROBE_TOOL = ToolSpec(
    name="look_up",
    description="Look something up.",
    parameters={
        "type": "object",
        "properties": {
            "word": {"type": "string", "description": "What to look up."},
            "most": {"type": "integer", "description": "How much to find."},
        },
        "required": ["word"],
    },
)
_ASK = Message(role="user", content="What is a cat?")
_PROBE = ToolCall(name="look_up", arguments={"word": "a cat", "most": 2}, id="a1b2c3d4e")


class CallSyntax(Protocol):
    """How a family of models writes tool calls."""

    @property
    def name(self) -> str:
        """Its name, as in `CALL_SYNTAXES`."""
        ...

    @property
    def mark(self) -> str:
        """What begins a call."""
        ...

    def read(self, text: str, tools: Sequence[ToolSpec]) -> tuple[str, list[ToolCall]]:
        """The text besides the calls, and the calls.

        Raises:
            MalformedCall: a call was begun, and it is not one.
        """
        ...

    def write(self, calls: Sequence[ToolCall]) -> str:
        """The calls as the model would write them; `read` gives them back.

        Raises:
            RenderError: the syntax has no way to write a value.
        """
        ...


class ReadTurn(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An assistant's turn, read from the text that it wrote."""

    message: Message  # content, reasoning and calls; the whole text as content where the calls are malformed
    error: str | None = None  # why the calls cannot be read, in words for the model


# By name, in the order in which `call_syntax_of` tries them.
CALL_SYNTAXES: dict[str, CallSyntax] = {syntax.name: syntax for syntax in (*JSON_SYNTAXES, *TAGGED_SYNTAXES)}


def read_turn(text: str, syntax: CallSyntax, tools: Sequence[ToolSpec] = ()) -> ReadTurn:
    """Read what an assistant wrote.

    Args:
        text: the turn's own text, special tokens included (`decode(…, skip_special_tokens=False)`), without the token
            that ends it.
        syntax: of its calls.
        tools: those offered; their schemas say which values are text where the syntax does not.

    Returns:
        The message. A call that was begun and is none (JSON that does not parse, a missing end) is an `error`, not an
        exception, and then no call is taken from the turn. Whether a tool of the name exists is the caller's affair.
    """
    reasoning, said = split_reasoning(text)
    try:
        content, calls = syntax.read(said, tools)
    except MalformedCall as error:
        return ReadTurn(message=Message(role="assistant", content=text), error=str(error))
    content = _ANSWER_MARKS.sub("", content).strip()
    return ReadTurn(
        message=Message(role="assistant", content=content, reasoning=reasoning, tool_calls=tuple(calls)),
    )


def split_reasoning(text: str) -> tuple[str | None, str]:
    """An assistant's reasoning, or None, and what follows it. Reasoning that never ends is all there is."""
    for opening, closing in _THOUGHTS:
        before, found, after = text.partition(closing)
        if found and (opening in before or not opening.startswith("<|channel")):
            return before.replace(opening, "").strip() or None, after.lstrip("\n")
        if opening in ("<think>", "[THINK]") and text.lstrip().startswith(opening):
            return text.replace(opening, "").strip() or None, ""
    return None, text


def call_syntax_of(renderer: Renderer) -> CallSyntax:
    """The syntax of a chat template's calls: the one that reads a sample call back from its own rendering.

    For a template that does not print calls (`shows_calls`), the one whose marks are in its text.

    Raises:
        RenderError: none does; name one of `CALL_SYNTAXES` instead.
    """
    for written in (sample_call_text(renderer) or "", _after_question(renderer)):
        fit = [syntax for syntax in CALL_SYNTAXES.values() if _reads_probe(syntax, written)]
        exact = [syntax for syntax in fit if syntax.write([_PROBE]).strip() in written]
        if fit:
            return (exact or fit)[0]
    templates = renderer.tokenizer.chat_templates
    template = renderer.template or templates.get("tool_use") or templates.get("default") or ""
    for syntax in CALL_SYNTAXES.values():
        if len(syntax.mark) > 4 and syntax.mark in template:
            return syntax
    raise RenderError(
        "the chat template shows no tool call in a syntax that is known here; name the one that the model was trained "
        f"on: {', '.join(CALL_SYNTAXES)}"
    )


def sample_call_text(renderer: Renderer) -> str | None:
    """How the chat template writes a sample call, without what ends the turn; None where that cannot be told."""
    try:
        rendered = renderer.render([_ASK, Message(role="assistant", tool_calls=(_PROBE,))], tools=[_PROBE_TOOL])
    except RenderError:
        return None
    tokens = [token for token, wrote in zip(rendered.tokens, rendered.mask, strict=True) if wrote]
    if tokens[-1:] and tokens[-1] in renderer.stop_tokens:
        tokens.pop()
    return renderer.tokenizer.decode(tokens, skip_special_tokens=False)


def _reads_probe(syntax: CallSyntax, written: str) -> bool:
    read = read_turn(written, syntax, (_PROBE_TOOL,)).message.tool_calls
    return [(call.name, call.arguments) for call in read] == [(_PROBE.name, _PROBE.arguments)]


def _after_question(renderer: Renderer) -> str:
    """What a template prints after the question that a sample call answers, its own marks too."""
    called = Message(role="assistant", tool_calls=(_PROBE,), train=False)
    try:
        text = renderer.render([_ASK, called], tools=[_PROBE_TOOL]).text
    except RenderError:
        return ""
    return text.rpartition(_ASK.content)[2]


def shows_calls(renderer: Renderer) -> bool:
    """Whether the chat template prints an assistant's tool calls. If not, they are written into the content."""
    return sample_call_text(renderer) is not None
