"""Locate the assistant's turns in rendered conversations: which renderings to ask for, and what to read from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from posttrain.core import Message, RenderError, ToolSpec, assistant, user
from posttrain.render.assistant_spans import Markers, TurnEnd, common_end, local_start, plain_turn_end
from posttrain.render.conversation import template_message, template_tool
from posttrain.render.marks import Marked, Marker
from posttrain.render.template_process import RenderedText, TemplateFailure

Dropped = Literal["refuse", "cover"]


@dataclass(frozen=True)
class Conversation:
    """One thing to render."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...] = ()
    add_generation_prompt: bool = False

    def variables(self, marker: Marker | None = None, assistant_only: bool = False) -> dict[str, Any]:
        """What the template is given, with marks if asked."""
        messages = [template_message(message) for message in self.messages]
        if marker is not None:
            messages = [
                values if assistant_only and values["role"] != "assistant" else marker.mark(values, index)
                for index, values in enumerate(messages)
            ]
        tools = [template_tool(tool) for tool in self.tools] or None
        return {"messages": messages, "tools": tools, "add_generation_prompt": self.add_generation_prompt}

    def prompt(self, turn: int) -> Conversation:
        """The sampler's prompt for the message `turn`."""
        return Conversation(self.messages[:turn], self.tools, True)

    def up_to(self, turn: int) -> Conversation:
        """The conversation that ends with the message `turn`."""
        return Conversation(self.messages[: turn + 1], self.tools)

    def followed(self, turn: int) -> Conversation:
        """The conversation up to `turn` with a message after it: its tools' answers, or a user's."""
        calls = self.messages[turn].tool_calls
        answers = [Message(role="tool", content="ok", tool_call_id=call.id, name=call.name) for call in calls]
        return Conversation((*self.messages[: turn + 1], *(answers or [user("ok")])), self.tools)

    def turns(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [index for index, message in enumerate(self.messages) if message.role == "assistant"]

    def trained_turns(self) -> list[int]:
        """Indices of the assistant's messages that are targets."""
        return [index for index in self.turns() if self.messages[index].train]


@dataclass
class TurnFinder:
    """Finds the assistant's spans for one template.

    `texts` renders sets of variables. What is learnt about the template is kept, so that a plain turn costs three
    renderings: the conversation, the marked conversation and the prompt.
    """

    texts: Callable[[Sequence[dict[str, Any]]], list[RenderedText | TemplateFailure]]
    markers: Markers
    eos_texts: tuple[str, ...]  # the tokenizer's end-of-sequence tokens as text
    end_of_turn: str | None = None  # set by the user, for templates that write none
    dropped: Dropped = "refuse"
    _plain_end: TurnEnd | None = field(default=None, init=False)

    def needed(self, conversation: Conversation) -> list[dict[str, Any]]:
        """The variables whose renderings `spans` needs: the conversation with marks, and each trained turn's prompt."""
        marker = Marker.for_messages(conversation.messages)
        prompts = [conversation.prompt(turn).variables() for turn in conversation.trained_turns()]
        return [conversation.variables(marker), *prompts]

    def spans(
        self, conversation: Conversation, text: str, renderings: Sequence[RenderedText | TemplateFailure]
    ) -> list[tuple[int, int]]:
        """Characters (start, end) of each trained turn, its end-of-turn token included.

        Args:
            conversation: what was rendered.
            text: its rendering.
            renderings: those of `needed`.

        Raises:
            RenderError: the template makes it impossible to tell, or does not show what the assistant wrote.
        """
        marked = self._marked(conversation, text, renderings[0])
        spans: list[tuple[int, int]] = []
        for turn, prompt in zip(conversation.trained_turns(), renderings[1:], strict=True):
            self._check_shown(conversation, turn, marked)
            start = self._start(conversation, turn, text, marked, prompt)
            anchor = marked.last(turn) if marked is not None else None
            end = self._end(conversation, turn, text, start if anchor is None else anchor, anchor is not None)
            if end < start or (spans and start < spans[-1][1]):
                raise RenderError(f"message {turn}: the chat template does not show the turns one after another")
            spans.append((start, end))
        return spans

    def tagged_spans(self, whole: RenderedText, turns: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """The template author's {% generation %} spans that lie in the trained turns.

        A span that stops short of the end-of-turn token right after it gets that token: a model that is not taught it
        never stops.
        """
        spans = []
        for start, end in whole.generation:
            if end > start and any(start < turn_end and turn_start < end for turn_start, turn_end in turns):
                match = next((m for e in self._ends() if e and (m := _ending(e).match(whole.text, end))), None)
                closed = whole.text[:end].rstrip().endswith(self._ends())
                spans.append((start, end if match is None or closed else match.end()))
        return spans

    def _ends(self) -> tuple[str, ...]:
        ends = self.plain_end()
        return tuple(end for end in dict.fromkeys((ends.before_next, ends.at_end)) if end)

    def plain_end(self) -> TurnEnd:
        """How the template ends an assistant's turn of plain text, found on a sample conversation."""
        if self._plain_end is None:
            self._plain_end = self._probe_end()
        return self._plain_end

    def marked_rendering(self, conversation: Conversation, text: str) -> Marked | None:
        """The conversation with marks, or None where marks change what the template prints."""
        for names, assistant_only in ((True, False), (False, False), (True, True), (False, True)):
            marker = Marker.for_messages(conversation.messages, names)
            rendering = self.texts([conversation.variables(marker, assistant_only)])[0]
            if isinstance(rendering, RenderedText) and (marked := marker.read(rendering.text)).text == text:
                return marked
        return None

    def _marked(
        self, conversation: Conversation, text: str, rendering: RenderedText | TemplateFailure
    ) -> Marked | None:
        if isinstance(rendering, RenderedText):
            marked = Marker.for_messages(conversation.messages).read(rendering.text)
            if marked.text == text:
                return marked
        return self.marked_rendering(conversation, text)

    def _probe_end(self) -> TurnEnd:
        if self.end_of_turn is not None:
            return TurnEnd(self.end_of_turn, self.end_of_turn)
        opening = (user("Hello."), assistant("Hi!"))
        tails = []
        for messages in (opening, (*opening, user("Bye."))):
            conversation = Conversation(messages)
            rendering = self.texts([conversation.variables()])[0]
            if isinstance(rendering, TemplateFailure):
                return TurnEnd("", "")
            marked = self.marked_rendering(conversation, rendering.text)
            last = None if marked is None else marked.last(1)
            if marked is None or last is None:
                return TurnEnd("", "")
            tails.append(marked.text[last:])
        return plain_turn_end(tails[0], tails[1], self.markers)

    def _check_shown(self, conversation: Conversation, turn: int, marked: Marked | None) -> None:
        """Refuse a turn of which the template leaves something out."""
        if marked is None:
            return
        message = conversation.messages[turn]
        content = message.content.rpartition("</think>")[2]
        if content.strip() and not marked.shows(turn, 0):
            raise RenderError(
                f"message {turn}: the chat template does not show what the assistant wrote here, or shows it twice; "
                "set train=False on the message, or use another template"
            )
        inline = message.content.rpartition("</think>")[0].replace("<think>", "")
        thinks = bool((message.reasoning or inline).strip())
        if thinks and not marked.shows(turn, 1) and self.dropped == "refuse":
            raise RenderError(
                f"message {turn}: the chat template leaves out the assistant's reasoning here, so the turn would be "
                "trained to answer without it. Train each turn as the last of its conversation "
                "(Renderer.render_turns), set train=False on the message, take the reasoning out, or give "
                'Renderer(dropped="cover") to train on what is shown'
            )
        for slot, call in enumerate(message.tool_calls, 2):
            if slot < 32 and not marked.shows(turn, slot) and call.name not in marked.text:
                raise RenderError(
                    f"message {turn}: the chat template does not show the call of the tool {call.name!r}; "
                    "use a template for tools, or write the call into the content"
                )

    def _start(
        self,
        conversation: Conversation,
        turn: int,
        text: str,
        marked: Marked | None,
        prompt: RenderedText | TemplateFailure,
    ) -> int:
        where = f"message {turn}"
        if isinstance(prompt, TemplateFailure):
            raise RenderError(f"{where}: the messages before it make no prompt: {prompt.error()}")
        if text.startswith(prompt.text):
            return len(prompt.text)
        first = marked.first(turn) if marked is not None else None
        before = marked.last(turn - 1) if marked is not None and turn else 0
        if first is None or before is None or before > first:
            raise RenderError(
                f"{where}: the chat template renders earlier messages differently once this turn is there, and nothing "
                "in the text shows where the turn begins; train it as the last of its conversation "
                "(Renderer.render_turns) or use another template"
            )
        return before + local_start(text[before:first], self._prompt_tail(conversation, turn, prompt.text), where)

    def _prompt_tail(self, conversation: Conversation, turn: int, prompt: str) -> str:
        """What the prompt has after the previous message's own text."""
        if not turn:
            return prompt
        marked = self.marked_rendering(conversation.prompt(turn), prompt)
        before = None if marked is None else marked.last(turn - 1)
        if before is None:
            raise RenderError(f"message {turn}: the chat template does not show the message before it in the prompt")
        return prompt[before:]

    def _end(self, conversation: Conversation, turn: int, text: str, anchor: int, at_text: bool) -> int:
        """Where the turn ends in `text`; `anchor` is the end of its last own text, or its start if it shows none."""
        message = conversation.messages[turn]
        final = turn == len(conversation.messages) - 1 and not conversation.add_generation_prompt
        ends = self.plain_end()
        if at_text and not message.tool_calls:
            expected = ends.at_end if final else ends.before_next
            match = _ending(expected).match(text, anchor)
            if expected and match:
                return self._checked_end(ends, final, turn, anchor, match.end())
        end = self._compared_end(conversation, turn, text, anchor, at_text)
        if end is not None:
            return self._with_stop(text, end)
        return self._declared_end(text, anchor, turn)

    def _checked_end(self, ends: TurnEnd, final: bool, turn: int, anchor: int, end: int) -> int:
        if final or ends.same:
            return end
        if self.dropped == "cover":
            return anchor
        raise RenderError(
            f"message {turn}: the chat template ends the last turn with {ends.at_end!r}, which the model samples, but "
            f"earlier turns with {ends.before_next!r}, which it does not. Train each turn as the last of its "
            "conversation (Renderer.render_turns), or set train=False on the earlier ones"
        )

    def _compared_end(self, conversation: Conversation, turn: int, text: str, anchor: int, at_text: bool) -> int | None:
        """The end as what the turn has in common as last message and before another; None if it has none."""
        last_turn = turn == len(conversation.messages) - 1
        as_last = self._tail(conversation.up_to(turn), turn, text[:anchor], at_text)
        if as_last is None:
            return None
        here = text[anchor:]
        if last_turn and not conversation.add_generation_prompt:
            followed = self._tail(conversation.followed(turn), turn, text[:anchor], at_text)
            if followed is None:
                whole = here.rstrip()
                return anchor + len(whole) if whole and self.markers.leading(here) == whole else None
            other = followed
        else:
            other = as_last
        common = common_end(here, other, self.markers)
        left = as_last[len(common) :].strip()
        if common and left in ("", *self.eos_texts):
            return anchor + len(common)
        return None

    def _tail(self, conversation: Conversation, turn: int, before: str, at_text: bool) -> str | None:
        """What a rendering has after the turn's own text, or, for a turn without text, after `before`."""
        rendering = self.texts([conversation.variables()])[0]
        if isinstance(rendering, TemplateFailure):
            return None
        if not at_text:
            return rendering.text[len(before) :] if rendering.text.startswith(before) else None
        marked = self.marked_rendering(conversation, rendering.text)
        last = None if marked is None else marked.last(turn)
        return None if last is None else rendering.text[last:]

    def _with_stop(self, text: str, end: int) -> int:
        """The end, with the stop token that follows it, where the end found is not one itself."""
        if self.eos_texts and not text[:end].endswith(self.eos_texts):
            for stop in self.eos_texts:
                if text.startswith(stop, end):
                    return end + len(stop)
        return end

    def _declared_end(self, text: str, anchor: int, turn: int) -> int:
        for stop in (*((self.end_of_turn,) if self.end_of_turn else ()), *self.eos_texts):
            if match := _ending(stop).match(text, anchor):
                return match.end()
        raise RenderError(
            f"message {turn}: the chat template writes no end-of-turn token after the assistant's text "
            f"({text[anchor : anchor + 40]!r} follows), so the model would never learn to stop; give "
            'Renderer(end_of_turn="…") the text that ends a turn'
        )


def _ending(end: str) -> re.Pattern[str]:
    """An end of turn as a pattern; white space before its control token may be the assistant's or the template's."""
    return re.compile(r"\s*" + re.escape(end.lstrip()) if end.strip() else re.escape(end))
