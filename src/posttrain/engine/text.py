"""Text of tokens as they come: pieces that concatenate to the whole, and stop strings found across token boundaries."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.core import TextTokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextCursor:
    """Reads one completion's tokens into text, holding back what is not settled yet.

    Held back are bytes of an unfinished character, and an end of text that may be the beginning of a stop string.
    """

    def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest = max((len(text) for text in stop), default=0)
        self._tokens: list[int] = []
        self._context = 0  # tokens from here on are decoded again, so that joins come out right
        self._read = 0  # tokens up to here are in `_text`
        self._text = ""
        self._given = 0  # characters of `_text` already handed out
        self._searched = 0  # characters of `_text` in which no stop string begins
        self._closed = False
        self.stopped = False  # a stop string has appeared

    @property
    def unsettled(self) -> bool:
        """True where the last tokens do not make whole characters yet."""
        return self._read < len(self._tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens pushed so far."""
        return len(self._tokens)

    def push(self, tokens: Sequence[int]) -> bool:
        """Read more tokens. Returns True once a stop string has appeared."""
        self._tokens.extend(tokens)
        before = self._decode(self._context, self._read)
        after = self._decode(self._context, len(self._tokens))
        if len(after) > len(before) and not after.endswith(_UNFINISHED):
            self._text += after[len(before) :]
            self._context, self._read = self._read, len(self._tokens)
            self._find_stop()
        return self.stopped

    def delta(self) -> str:
        """The settled text since the last call."""
        held = 0 if self.stopped or self._closed else self._held_back()
        end = max(self._given, len(self._text) - held)
        piece, self._given = self._text[self._given : end], end
        return piece

    def finish(self, tokens: Sequence[int]) -> str:
        """The whole text of the finished completion.

        Args:
            tokens: all of its tokens that have text (no end-of-sequence token).

        Returns:
            The decoded tokens, cut at the stop string. What `delta` gave before is its beginning.
        """
        self._closed = True
        if self.stopped:
            return self._text
        whole = self._tokenizer.decode(list(tokens))
        given = self._text[: self._given]
        if whole.startswith(given):
            self._text, self._searched = whole, 0
        else:
            # Decoders exist whose text of a whole is not its parts joined; what a client was told stays told.
            tail = self._decode(self._context, len(self._tokens))[len(self._decode(self._context, self._read)) :]
            self._text += tail
        self._find_stop()
        return self._text

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._tokens[start:end]) if start < end else ""

    def _find_stop(self) -> None:
        if not self._stop:
            return
        found = [place for text in self._stop if (place := self._text.find(text, self._searched)) >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True
        else:
            self._searched = max(0, len(self._text) - self._longest + 1)

    def _held_back(self) -> int:
        """How many last characters may turn out to begin a stop string."""
        for size in range(min(self._longest - 1, len(self._text)), 0, -1):
            tail = self._text[-size:]
            if any(text.startswith(tail) for text in self._stop):
                return size
        return 0


class StopCandidates:
    """Which tokens can complete a stop string, so that the others need not be decoded.

    A stop string is complete only when its last character is written, so only tokens whose own text holds that
    character (or is no finished character by itself) are worth decoding the text for.
    """

    def __init__(self, tokenizer: TextTokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._pieces: list[str] | None = None
        self._by_character: dict[str, frozenset[int] | None] = {}

    def tokens(self, stop: Sequence[str]) -> frozenset[int] | None:
        """Candidate ids for these stop strings; None where every token is one."""
        sets = [self._of(text[-1]) for text in stop]
        if any(ids is None for ids in sets):
            return None
        return frozenset().union(*(ids for ids in sets if ids is not None))

    def special(self, stop: Sequence[str]) -> frozenset[int]:
        """Ids of stop strings that are special tokens: text leaves those out, so they are stopped at by id."""
        found = set()
        for text in stop:
            ids = self._tokenizer.encode(text)
            if len(ids) == 1 and not self._tokenizer.decode(ids):
                found.add(ids[0])
        return frozenset(found)

    def _of(self, character: str) -> frozenset[int] | None:
        if character == " ":
            return None  # decoders add and drop spaces between tokens
        if character not in self._by_character:
            if self._pieces is None:
                known = min(self._vocab_size, self._tokenizer.vocab_size)
                self._pieces = [self._tokenizer.decode([token], skip_special_tokens=False) for token in range(known)]
            self._by_character[character] = frozenset(
                token for token, piece in enumerate(self._pieces) if character in piece or _UNFINISHED in piece
            )
        return self._by_character[character]
