"""Locate the assistant's turns in rendered conversations: which renderings to ask for, and what to read from them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.core import RenderError
from posttrain.render.assistant_spans import common_end, local_start
from posttrain.render.conversation import Conversation
from posttrain.render.marks import Marked, Marker
from posttrain.render.template_facts import TemplateFacts
from posttrain.render.template_process import RenderedText, TemplateFailure

Dropped = Literal["refuse", "cover"]
Rendering = RenderedText | TemplateFailure


@dataclass(frozen=True)
class TurnFinder:
    """Finds the assistant's spans for one template. A plain turn costs three renderings: the conversation, the marked
    conversation and the prompt."""

    facts: TemplateFacts
    dropped: Dropped = "refuse"

    def needed(self, conversation: Conversation) -> list[dict[str, Any]]:
        """The variables whose renderings `spans` needs: the conversation with marks, and each trained turn's prompt."""
        marker = Marker.for_messages(conversation.messages)
        prompts = [conversation.prompt(turn).variables() for turn in conversation.trained_turns()]
        return [conversation.variables(marker), *prompts]

    def spans(self, conversation: Conversation, text: str, renderings: Sequence[Rendering]) -> list[tuple[int, int]]:
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
            finding = _Turn(self.facts, self.dropped, conversation, turn, text, marked)
            finding.check_shown()
            start = finding.start(prompt)
            end = finding.end(start)
            finding.check_written(text[start:end])
            if end < start or (spans and start < spans[-1][1]):
                raise RenderError(f"message {turn}: the chat template does not show the turns one after another")
            spans.append((start, end))
        return spans

    def tagged_spans(self, whole: RenderedText, turns: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """The template author's {% generation %} spans that lie in the trained turns.

        A span that stops short of the end-of-turn token right after it gets that token: a model that is not taught it
        never stops.
        """
        ends = self.facts.turn_end
        known = tuple(end for end in dict.fromkeys((ends.before_next, ends.at_end)) if end)
        spans = []
        for start, end in whole.generation:
            if end > start and any(start < turn_end and turn_start < end for turn_start, turn_end in turns):
                closed = whole.text[:end].rstrip().endswith(known)
                match = next((m for text in known if (m := ending(text).match(whole.text, end))), None)
                spans.append((start, end if match is None or closed else match.end()))
        return spans

    def _marked(self, conversation: Conversation, text: str, rendering: Rendering) -> Marked | None:
        if isinstance(rendering, RenderedText):
            marked = Marker.for_messages(conversation.messages).read(rendering.text)
            if marked.text == text:
                return marked
        return self.facts.marked(conversation, text)


@dataclass(frozen=True)
class _Turn:
    """One trained turn of one rendered conversation."""

    facts: TemplateFacts
    dropped: Dropped
    conversation: Conversation
    turn: int
    text: str
    marked: Marked | None

    def check_shown(self) -> None:
        """Refuse a turn of which the template leaves something out."""
        if self.marked is None:
            return
        message = self.conversation.messages[self.turn]
        thought, _, content = message.content.rpartition("</think>")
        if content.strip() and not self.marked.shows(self.turn, 0):
            raise self._error(
                "the chat template does not show what the assistant wrote here, or shows it twice; set train=False on "
                "the message, or use another template"
            )
        thinks = bool((message.reasoning or thought.replace("<think>", "")).strip())
        if thinks and not self.marked.shows(self.turn, 1) and self.dropped == "refuse":
            raise self._error(
                "the chat template leaves out the assistant's reasoning here, so the turn would be trained to answer "
                "without it. Train each turn as the last of its conversation (Renderer.render_turns), set train=False "
                "on the message, take the reasoning out, write it into the content if the template reads it there, or "
                'give Renderer(dropped="cover") to train on what is shown'
            )

    def check_written(self, written: str) -> None:
        """Refuse a turn whose content the template changes, or whose tool calls it does not show."""
        if self.conversation.messages[self.turn].content.rpartition("</think>")[2].strip() not in written:
            raise self._error(
                "the chat template does not show what the assistant wrote as it is; use another template, or write the "
                "content as the template shows it"
            )
        for call in self.conversation.messages[self.turn].tool_calls:
            if call.name not in written:
                raise self._error(
                    f"the chat template does not show the call of the tool {call.name!r}; use a template for tools, or "
                    "write the call into the content"
                )

    def start(self, prompt: Rendering) -> int:
        """Where the turn begins: after the sampler's prompt."""
        if isinstance(prompt, TemplateFailure):
            raise self._error(f"the messages before it make no prompt: {prompt.error()}")
        if self.text.startswith(prompt.text):
            return len(prompt.text)
        first = None if self.marked is None else self.marked.first(self.turn)
        before = self.marked.last(self.turn - 1) if self.marked is not None and self.turn else 0
        if first is None or before is None or before > first:
            raise self._error(
                "the chat template renders earlier messages differently once this turn is there, and nothing in the "
                "text shows where the turn begins; train it as the last of its conversation (Renderer.render_turns) "
                "or use another template"
            )
        segment = self.text[before:first]
        tail = self._prompt_tail(prompt.text)
        size = local_start(segment, tail, self.facts.header, self.facts.markers)
        if size is None:
            raise self._error(
                f"the chat template shows this turn after {segment[-80:]!r}, but prompts for it with {tail[-80:]!r}; "
                "what the assistant wrote cannot be told apart. Train the turn as the last of its conversation "
                "(Renderer.render_turns), set a switch of the template (template_kwargs), or give a template with "
                "{% generation %} marks"
            )
        return before + size

    def end(self, start: int) -> int:
        """Where the turn ends: after its end-of-turn token."""
        last = None if self.marked is None else self.marked.last(self.turn)
        anchor = start if last is None else max(start, last)
        message = self.conversation.messages[self.turn]
        ends = self.facts.turn_end
        final = self.turn == len(self.conversation.messages) - 1 and not self.conversation.add_generation_prompt
        if last is not None and not message.tool_calls:
            expected = ends.at_end if final else ends.before_next
            if expected and (match := ending(expected).match(self.text, anchor)):
                return self._plain_end(final, anchor, match.end())
        found = self._compared_end(anchor, last is not None)
        if found is not None:
            found = self._with_stop(found)
            own = ends.at_end and self.facts.end_of_turn is None
            if own or self.text[:found].endswith((*self.facts.eos_texts, self.facts.end_of_turn or "\0")):
                return found
        return self._known_end(anchor)

    def _prompt_tail(self, prompt: str) -> str:
        """What the prompt has after the previous message's own text."""
        if not self.turn:
            return prompt
        marked = self.facts.marked(self.conversation.prompt(self.turn), prompt)
        before = None if marked is None else marked.last(self.turn - 1)
        if before is None:
            raise self._error("the chat template does not show the message before it in the prompt")
        return prompt[before:]

    def _plain_end(self, final: bool, anchor: int, end: int) -> int:
        ends = self.facts.turn_end
        if final or ends.same:
            return end
        if self.dropped == "cover":
            return anchor
        raise self._error(
            f"the chat template ends the last turn with {ends.at_end!r}, which the model samples, but earlier turns "
            f"with {ends.before_next!r}, which it does not. Train each turn as the last of its conversation "
            "(Renderer.render_turns), or set train=False on the earlier ones"
        )

    def _compared_end(self, anchor: int, shown: bool) -> int | None:
        """The end as what the turn has in common as last message and before another; None if it has none."""
        before = self.text[:anchor]
        as_last = self._tail(self.conversation.up_to(self.turn), before, shown)
        if as_last is None:
            return None
        here = other = self.text[anchor:]
        if self.turn == len(self.conversation.messages) - 1 and not self.conversation.add_generation_prompt:
            followed = self._tail(self.conversation.followed(self.turn), before, shown)
            if followed is None:
                whole = here.rstrip()
                return anchor + len(whole) if whole and self.facts.markers.leading(here) == whole else None
            other = followed
        else:
            other = as_last
        common = common_end(here, other, self.facts.markers)
        left = as_last[len(common) :].strip()
        return anchor + len(common) if common and left in ("", *self.facts.eos_texts) else None

    def _tail(self, conversation: Conversation, before: str, shown: bool) -> str | None:
        """What a rendering has after the turn's own text, or, for a turn without text, after `before`."""
        rendering = self.facts.texts([conversation.variables()])[0]
        if isinstance(rendering, TemplateFailure):
            return None
        if not shown:
            return rendering.text[len(before) :] if rendering.text.startswith(before) else None
        marked = self.facts.marked(conversation, rendering.text)
        last = None if marked is None else marked.last(self.turn)
        return None if last is None else rendering.text[last:]

    def _with_stop(self, end: int) -> int:
        """The end, with the stop token that follows it, where the end found is not one itself."""
        if self.text[:end].endswith(self.facts.eos_texts or ("\0",)):
            return end
        stops = (stop for stop in self.facts.eos_texts if self.text.startswith(stop, end))
        return end + len(next(stops, ""))

    def _known_end(self, anchor: int) -> int:
        """The end by what is known to end turns: the plain turn's end, if it comes once, or an eos token next."""
        after = None if self.marked is None else self.marked.first(self.turn + 1)
        known = self.facts.turn_end.before_next if after is not None else self.facts.turn_end.at_end
        region = self.text[anchor:after]
        if known.strip() and region.count(known) == 1:
            return anchor + region.index(known) + len(known)
        for stop in self.facts.eos_texts:
            if match := ending(stop).match(self.text, anchor):
                return match.end()
        guess = self.facts.likely_end
        raise self._error(
            "it cannot be told what ends the assistant's turn in this chat template (its text is followed by "
            f"{self.text[anchor : anchor + 40]!r}), so the model would not learn to stop; "
            "give Renderer(end_of_turn=…) the text that does" + (f", perhaps {guess!r}" if guess else "")
        )

    def _error(self, problem: str) -> RenderError:
        return RenderError(f"message {self.turn}: {problem}")


def ending(end: str) -> re.Pattern[str]:
    """An end of turn as a pattern; white space before its control token may be the assistant's or the template's."""
    return re.compile(r"\s*" + re.escape(end.lstrip()) if end.strip() else re.escape(end))
