"""What a growing conversation keeps of its earlier turns."""

from __future__ import annotations

from posttrain.core import Record
from posttrain.render.assistant_spans import common_length


class TurnPrefix(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether one assistant turn is still there, as it was sampled, in the whole conversation's rendering."""

    turn: int  # index of the message
    prompt_kept: bool  # the whole text begins with the prompt that the sampler was given
    text_kept: bool  # … and with that prompt followed by the turn, its end-of-turn token included
    tokens_kept: bool  # the whole conversation's tokens begin with the prompt's tokens
    sampled: str = ""  # where they part: up to 60 characters as the sampler met them
    rendered: str = ""  # … and as the whole conversation shows them

    def kept(self) -> bool:
        """Nothing changed."""
        return self.prompt_kept and self.text_kept and self.tokens_kept


class PrefixReport(Record, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the template does to earlier turns of a conversation."""

    turns: tuple[TurnPrefix, ...]

    @property
    def stable(self) -> bool:
        """Every turn is kept: training on the whole rendering is training on what was sampled."""
        return all(turn.kept() for turn in self.turns)

    def why(self) -> str:
        """The first turn that changes, in words; empty if stable."""
        for turn in self.turns:
            if not turn.text_kept:
                return f"message {turn.turn}: sampled as {turn.sampled!r}, later rendered as {turn.rendered!r}"
            if not turn.kept():
                return f"message {turn.turn}: the prompt's tokens change at its end once the turn follows"
        return ""


def first_difference(one: str, other: str) -> int:
    """Index of the first character in which two texts differ."""
    return common_length(one, other)
