"""Text as it streams: pieces, unfinished characters, stop strings over token boundaries."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.engine.text import StopCandidates, TextCursor
from posttrain.render import Tokenizer


def stream(tokenizer: Any, tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], str, bool]:
    """Pieces, whole text and whether it stopped, token by token."""
    cursor = TextCursor(tokenizer, stop)
    pieces: list[str] = []
    for place, token in enumerate(tokens):
        if cursor.push([token]):
            tokens = tokens[: place + 1]
            break
        pieces.append(cursor.delta())
    text = cursor.finish(tokens)
    pieces.append(cursor.delta())
    return pieces, text, cursor.stopped


def test_a_character_is_shown_when_it_is_whole(tokenizer: Any) -> None:
    pieces, text, _ = stream(tokenizer, list("aé€😀b".encode()))
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]
    assert text == "aé€😀b"


def test_bytes_that_never_become_a_character_are_replaced_at_the_end(tokenizer: Any) -> None:
    pieces, text, _ = stream(tokenizer, [97, 0xF0, 0x9F])
    assert "".join(pieces) == text == tokenizer.decode([97, 0xF0, 0x9F])


def test_a_stop_string_is_found_over_token_boundaries(tokenizer: Any) -> None:
    pieces, text, stopped = stream(tokenizer, list(b"one##END two"), ("#END",))
    assert stopped
    assert text == "one#"
    assert "".join(pieces) == text


def test_the_beginning_of_a_stop_string_is_held_back_and_given_if_it_was_none(tokenizer: Any) -> None:
    pieces, text, stopped = stream(tokenizer, list(b"a ENx END"), ("END!",))
    assert not stopped
    assert pieces[:6] == ["a", " ", "", "", "ENx", " "]
    assert "".join(pieces) == text == "a ENx END"


def test_the_earliest_of_several_stop_strings_cuts(tokenizer: Any) -> None:
    _, text, stopped = stream(tokenizer, list(b"abcdef"), ("ef", "cd", "xyz"))
    assert stopped
    assert text == "ab"


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=4), max_size=3))
@settings(max_examples=150, deadline=None)
def test_pieces_concatenate_to_the_text_cut_at_the_first_stop(text: str, stop: list[str]) -> None:
    tokenizer = _Bytes()
    pieces, whole, stopped = stream(tokenizer, list(text.encode()), tuple(stop))
    assert "".join(pieces) == whole
    # The stop that is complete first, in reading order, ends the text; of those, the one that begins first.
    ends = sorted((text.find(s) + len(s), text.find(s)) for s in stop if s in text)
    first_end = ends[0][0] if ends else None
    assert stopped == bool(ends)
    assert whole == (text if first_end is None else text[: min(start for end, start in ends if end == first_end)])


@given(st.binary(max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_bytes_stream_to_what_they_decode_to(data: bytes) -> None:
    tokenizer = _Bytes()
    pieces, whole, _ = stream(tokenizer, list(data))
    assert "".join(pieces) == whole == tokenizer.decode(list(data))


def test_pieces_of_a_trained_tokenizer() -> None:
    tokenizer = Tokenizer.train_bpe(["the cat sat on the mat, naïve café 😀 " * 4], 300)
    text = "the café 😀 sat naïve — 日本語 ok"
    pieces, whole, _ = stream(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == whole == text
    _, cut, stopped = stream(tokenizer, tokenizer.encode(text), ("aïve",))
    assert stopped
    assert cut == "the café 😀 sat n"


def test_only_tokens_that_can_complete_a_stop_string_are_candidates(tokenizer: Any) -> None:
    candidates = StopCandidates(tokenizer, 258)
    found = candidates.tokens(["ab", "xz"])
    assert found is not None
    assert {ord("b"), ord("z")} <= found
    assert ord("a") not in found
    assert all(token in found for token in range(128, 256))  # parts of characters
    assert candidates.tokens(["end "]) is None  # decoders move spaces about
    assert candidates.special(["<x>", "ab"]) == frozenset({257})


@pytest.mark.parametrize("size", [1, 3])
def test_late_pushes_find_the_same_stop(tokenizer: Any, size: int) -> None:
    tokens = list(b"hello wor#ld#! and more")
    cursor = TextCursor(tokenizer, ("#!",))
    for start in range(0, len(tokens), size):
        if cursor.push(tokens[start : start + size]):
            break
    assert cursor.finish([]) == "hello wor#ld"


class _Bytes:
    vocab_size = 256
    eos_ids: frozenset[int] = frozenset()

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Any, *, skip_special_tokens: bool = True) -> str:
        return bytes(tokens).decode("utf-8", "replace")
