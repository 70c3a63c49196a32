"""Tokens become whole characters, and no part of a stop string is ever given out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_service.engine.generation.text import StopFinder, TokenText


def decode_bytes(ids: Sequence[int]) -> str:
    """A vocabulary of single bytes, as a byte-level decoder has it."""
    return bytes(ids).decode("utf-8", errors="replace")


def decode_words(ids: Sequence[int]) -> str:
    """A decoder that drops the space in front of a text's first word, as sentencepiece's does."""
    return " ".join(f"w{token}" for token in ids)


def decode_fallback(ids: Sequence[int]) -> str:
    """Every byte of a group that is not UTF-8 as a whole becomes a replacement of its own, as byte fallback has it."""
    try:
        return bytes(ids).decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(ids)


@given(st.text(alphabet=st.characters(blacklist_categories=["Cs"], blacklist_characters="\ufffd"), max_size=20))
def test_every_piece_is_whole_characters_and_all_of_them_come(text: str) -> None:
    for decode in (decode_bytes, decode_fallback):
        stream = TokenText(decode)
        pieces = [stream.add(byte) for byte in text.encode()]
        assert "".join(pieces) + stream.finish() == text
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_space_between_words_is_kept() -> None:
    stream = TokenText(decode_words)
    assert [stream.add(token) for token in (1, 2, 3)] == ["w1", " w2", " w3"]


def test_a_character_that_is_never_completed_is_left_out() -> None:
    stream = TokenText(decode_bytes)
    assert [stream.add(byte) for byte in b"a" + "€".encode()[:2]] == ["a", "", ""]
    assert stream.finish() == ""


def test_bytes_that_are_no_character_hold_up_what_follows_for_a_few_tokens_only() -> None:
    stream = TokenText(decode_bytes)
    said = "".join(stream.add(0xFF) for _ in range(30))
    assert said
    assert set(said) == {"\ufffd"}


@pytest.mark.parametrize(
    ("stops", "pieces", "given_out", "found"),
    [
        (["END"], ["some E", "N", "D more"], ["some ", "", ""], "END"),
        (["END"], ["some E", "NO"], ["some ", "ENO"], None),
        (["aab"], ["aaa", "b"], ["a", ""], "aab"),
        (["\n\n", "\nUser:"], ["yes\n", "User", ": x"], ["yes", "", ""], "\nUser:"),
        (["bc", "abcd"], ["abc"], ["a"], "bc"),
        (["ab", "abc"], ["xabc"], ["x"], "abc"),
        ([], ["all", "of it"], ["all", "of it"], None),
        ([""], ["all"], ["all"], None),
    ],
)
def test_stop_strings(stops: list[str], pieces: list[str], given_out: list[str], found: str | None) -> None:
    finder = StopFinder(stops)
    assert [finder.add(piece) for piece in pieces] == given_out
    assert finder.found == found


@given(st.lists(st.text("ab", max_size=4), max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_what_is_given_out_ends_before_the_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    finder = StopFinder(stops)
    said = "".join(finder.add(piece) for piece in pieces) + finder.finish()
    # The text up to where the first stop string is complete, and from there back to where it begins.
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    if not ends:
        assert (said, finder.found) == (whole, None)
        return
    assert finder.found in stops
    assert whole.startswith(said + str(finder.found))
    assert not any(stop in said for stop in stops)
