"""Which characters of a rendered conversation the assistant wrote.

For the assistant's turn i of a conversation rendered to the text X:

start   The sampler's prompt for the turn is P, the messages before it with the generation prompt. Where X begins with P
        the turn starts at its end. Where the template renders earlier messages differently by then (it drops old
        reasoning, moves the system prompt), only what P has after the previous message's own text is compared.
end     After the end-of-turn token. It is what follows the turn's text both when the turn is the last message and when
        another follows: the longest common continuation, cut to whole markers.

Where either cannot be told, the caller refuses: a mask that is nearly right trains the wrong thing silently.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

# What templates use as control tokens: <|eot_id|>, <｜end▁of▁sentence｜>, </s>, <end_of_turn>, [/INST], <tool_call>.
MARKER = re.compile(r"<[^<>\s]{1,64}>|\[/?[A-Z_]+\]")

# How templates open a chain of thought in the generation prompt.
THOUGHT_OPENER = re.compile("think|thought|reason", re.IGNORECASE)


@dataclass(frozen=True)
class TurnEnd:
    """How a template ends an assistant's turn of plain text."""

    before_next: str  # when another message follows
    at_end: str  # when it is the last message

    @property
    def same(self) -> bool:
        """Whether the two agree: what was sampled can stay in the history as it is."""
        return self.before_next == self.at_end


class Markers:
    """Finds whole control tokens in a text."""

    def __init__(self, tokens: Sequence[str] = ()) -> None:
        """`tokens`: the tokenizer's added tokens, whatever they look like; white space alone is none."""
        literal = sorted({token for token in tokens if token.strip()}, key=len, reverse=True)
        self._pattern = re.compile("|".join([*map(re.escape, literal), MARKER.pattern]))

    def leading(self, text: str) -> str:
        """White space and the control token that a text begins with, or ""."""
        space = len(text) - len(text.lstrip())
        match = self._pattern.match(text, space)
        return text[: match.end()] if match else ""

    def ends_with_one(self, text: str) -> bool:
        """Whether the last thing in a text is a control token."""
        return any(match.end() == len(text) for match in self._pattern.finditer(text))

    def whole(self, text: str, cut: int) -> int:
        """The cut, moved back to the start of the control token that it would split."""
        for match in self._pattern.finditer(text):
            if match.start() < cut < match.end():
                return match.start()
        return cut


def common_length(one: str, other: str) -> int:
    """Length of the longest common prefix."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def common_end(here: str, there: str, markers: Markers) -> str:
    """The common continuation of a turn in two renderings, up to its last whole control token.

    Args:
        here: what follows the turn's text in the rendering at hand.
        there: what follows it in another, in which something else comes next.

    Returns:
        The beginning of `here` that ends the turn, or "" where the two have no control token in common.
    """
    cut = common_length(here, there)
    cut = min(markers.whole(here, cut), markers.whole(there, cut))
    common = here[:cut].rstrip()
    return common if markers.ends_with_one(common) else ""


def plain_turn_end(last: str, followed: str, markers: Markers, eos_texts: Sequence[str] = ()) -> TurnEnd:
    """The end of a plain turn, from what follows its text as last message and before a user's message.

    Args:
        last: what follows the text of a turn that is the last message.
        followed: what follows it before a user's message.
        markers: finds control tokens.
        eos_texts: what a template may write at the very end of a conversation.
    """
    common = common_end(followed, last, markers)
    left = last[len(common) :].strip()
    if common and left in ("", *eos_texts):
        return TurnEnd(common, common)
    ending = markers.leading(last)
    if not common and ending and last.strip() == ending.strip():
        return TurnEnd(markers.leading(followed), ending)
    return TurnEnd("", "")


def local_start(segment: str, prompt_tail: str, header: str, markers: Markers) -> int | None:
    """How much of `segment` is the prompt's, where earlier messages were rendered differently; None if it is unclear.

    Args:
        segment: the template's text between the previous message's own text and the assistant's first.
        prompt_tail: what the sampler's prompt has after the previous message's own text.
        header: what the generation prompt adds to a conversation: the header of an assistant's turn, and in some
            templates the opening of a chain of thought, which turns without one do not show.
        markers: finds control tokens.
    """
    if segment.startswith(prompt_tail):
        return len(prompt_tail)
    if prompt_tail.startswith(segment):
        return len(segment)
    for length in range(len(header), 0, -1):
        at = segment.rfind(header[:length])
        if at >= 0:
            kept = min(markers.whole(header, length), markers.whole(segment, at + length) - at)
            opened = not header[kept:].strip() or THOUGHT_OPENER.search(header[kept:])
            return at + kept if kept > 0 and opened else None
    return None


def token_mask(
    offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]], whole: Sequence[bool]
) -> tuple[bool, ...]:
    """Which tokens hold at least one character of the spans.

    Args:
        offsets: T, characters (start, end) of each token, in order.
        spans: characters (start, end), in order, not overlapping.
        whole: T, True for control tokens. One that begins before a span is the template's, even if it swallowed white
            space at the span's start.
    """
    starts = [start for start, _ in offsets]
    ends = [end for _, end in offsets]
    mask = [False] * len(offsets)
    for first, last in spans:
        for at in range(bisect_right(ends, first), bisect_left(starts, last)):
            mask[at] |= starts[at] < ends[at] and not (whole[at] and starts[at] < first)
    return tuple(mask)
