"""What can be learnt about a chat template by rendering sample conversations with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from posttrain.core import Message, ToolCall, ToolSpec, assistant, user
from posttrain.render.assistant_spans import Markers, TurnEnd, common_length, plain_turn_end
from posttrain.render.conversation import CallForm, Conversation
from posttrain.render.marks import Marked, Marker
from posttrain.render.template_process import RenderedText, TemplateFailure

RenderRows = Callable[[Sequence[dict[str, Any]]], list[RenderedText | TemplateFailure]]

GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\b")
OPENING = (user("Hello."), assistant("Hi!"))
FOLLOWED = (*OPENING, user("Bye."))
SAMPLE_TOOL = ToolSpec(
    name="look",
    description="Look.",
    parameters={
        "type": "object",
        "properties": {"at": {"type": "string", "description": "What to look at."}},
        "required": ["at"],
    },
)
SAMPLE_CALL = ToolCall(name="look", arguments={"at": "it"}, id="a1b2c3d4e")


class TemplateFacts:
    """One chat template and what it was found to do. Each fact is found once, when first asked for."""

    def __init__(self, template: str, render: RenderRows, tokens: Sequence[str], eos_texts: Sequence[str]) -> None:
        """
        Args:
            template: Jinja text.
            render: renders sets of variables with it.
            tokens: the tokenizer's added tokens.
            eos_texts: those of them that end a sequence.
        """
        self.template = template
        self.markers = Markers([*tokens, *eos_texts])
        self.eos_texts = tuple(eos_texts)
        self.end_of_turn: str | None = None  # set by the user, for a template that writes none
        self._render = render

    @cached_property
    def tagged(self) -> bool:
        """Whether its author marked what the assistant writes with {% generation %}."""
        return GENERATION_TAG.search(self.template) is not None

    @cached_property
    def call_form(self) -> CallForm:
        """The first form of a tool call that the template prints whole.

        Given arguments as an object some templates fail, or escape quotes for HTML; given None for empty content some
        fail or print "None", and given an empty text some write an empty turn after the call.
        """
        call = Message(role="assistant", tool_calls=(SAMPLE_CALL,))
        answer = Message(role="tool", content="It.", tool_call_id=SAMPLE_CALL.id, name=SAMPLE_CALL.name)
        samples = ((OPENING[0], call), (OPENING[0], call, answer, OPENING[1]))
        forms = [CallForm(as_text, no_content) for as_text in (False, True) for no_content in (True, False)]
        texts = {
            form: self._render([Conversation(sample, (SAMPLE_TOOL,), form=form).variables() for sample in samples])
            for form in forms
        }
        return min(forms, key=lambda form: sum(map(_spoilt, texts[form])))

    @cached_property
    def turn_end(self) -> TurnEnd:
        """How an assistant's turn of plain text ends; empty texts where that cannot be told."""
        if self.end_of_turn is not None:
            return TurnEnd(self.end_of_turn, self.end_of_turn)
        tails = [self._tail(messages, False) for messages in (OPENING, FOLLOWED)]
        if tails[0] is None or tails[1] is None:
            return TurnEnd("", "")
        return plain_turn_end(tails[0], tails[1], self.markers, self.eos_texts)

    @cached_property
    def likely_end(self) -> str:
        """What follows a plain turn when a user speaks next: a guess at `end_of_turn`, for error messages."""
        return self.markers.leading(self._tail(FOLLOWED, False) or "")

    @cached_property
    def header(self) -> str:
        """What the generation prompt adds to a conversation."""
        asked, unasked = (self._tail(OPENING[:1], flag) for flag in (True, False))
        if asked is None or unasked is None:
            return ""
        return asked[self.markers.whole(asked, common_length(asked, unasked)) :]

    def texts(self, rows: Sequence[dict[str, Any]]) -> list[RenderedText | TemplateFailure]:
        """Render; a conversation that ends with the assistant gets `end_of_turn` if the template writes none there."""
        results = self._render(rows)
        end = self.end_of_turn
        if end is None or not self._end_missing:
            return results
        return [
            RenderedText(result.text + end, result.generation)
            if isinstance(result, RenderedText) and _ends_with_assistant(row) and not result.text.endswith(end)
            else result
            for row, result in zip(rows, results, strict=True)
        ]

    def marked(self, conversation: Conversation, text: str) -> Marked | None:
        """The conversation with marks, or None where marks change what the template prints."""
        for names, assistant_only in ((True, False), (False, False), (True, True), (False, True)):
            marker = Marker.for_messages(conversation.messages, names)
            rendering = self.texts([conversation.variables(marker, assistant_only)])[0]
            if isinstance(rendering, RenderedText) and (marked := marker.read(rendering.text)).text == text:
                return marked
        return None

    @cached_property
    def _end_missing(self) -> bool:
        """Whether the template leaves the user's `end_of_turn` out after the last turn."""
        rendering = self._sample(OPENING, False)
        return rendering is None or (self.end_of_turn or "") not in rendering.rpartition(OPENING[1].content)[2]

    def _sample(self, messages: Sequence[Message], prompt: bool) -> str | None:
        """A sample conversation's text; with a tool for templates that need one."""
        for tools in ((), (SAMPLE_TOOL,)):
            rendering = self._render([Conversation(tuple(messages), tools, prompt).variables()])[0]
            if isinstance(rendering, RenderedText):
                return rendering.text
        return None

    def _tail(self, messages: Sequence[Message], prompt: bool) -> str | None:
        """What a sample conversation has after its assistant's text, or its only message's."""
        for tools in ((), (SAMPLE_TOOL,)):
            conversation = Conversation(tuple(messages), tools, prompt)
            rendering = self.texts([conversation.variables()])[0]
            if isinstance(rendering, RenderedText):
                marked = self.marked(conversation, rendering.text)
                last = None if marked is None else marked.last(min(1, len(messages) - 1))
                return None if last is None else rendering.text[last:]
        return None


def _spoilt(rendering: RenderedText | TemplateFailure) -> int:
    """How badly a sample with a tool call came out; what all forms have in common does not matter."""
    if isinstance(rendering, TemplateFailure):
        return 100
    return rendering.text.count("&#34;") + rendering.text.count("None")


def _ends_with_assistant(row: Mapping[str, Any]) -> bool:
    messages = row["messages"]
    if not messages or row["add_generation_prompt"]:
        return False
    # After a tool call such templates go on with the tool's answer, not with what ends a plain turn.
    return messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]
