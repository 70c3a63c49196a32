"""Frames of recorded passes: each holds its own pass, wastes little, and takes others that are near."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_service.engine.fast_path.frames import Frame, choose_frame, frame_of

_LENGTHS = st.lists(st.integers(1, 3000), min_size=1, max_size=60)


@given(lengths=_LENGTHS, part=st.floats(0, 1))
def test_a_frame_holds_its_pass_and_little_more(lengths: list[int], part: float) -> None:
    tokens, targets = sum(lengths), int(part * (sum(lengths) - len(lengths)))
    frame = frame_of(lengths, targets)
    filled = frame.fill(lengths)
    assert frame.holds(lengths, targets)
    assert frame.is_near(frame)
    assert filled[: len(lengths)] == tuple(lengths)
    assert sum(filled) == frame.tokens
    assert max(filled) <= frame.longest
    assert min(filled) > 0
    assert len(filled) <= frame.sequences
    assert frame.tokens <= max(256, tokens * 5 // 4 + 64)
    assert targets <= frame.targets <= max(targets, 1) + frame.tokens // 8


@given(lengths=_LENGTHS, others=_LENGTHS)
def test_a_known_frame_is_taken_only_by_what_fits(lengths: list[int], others: list[int]) -> None:
    targets = sum(lengths) - len(lengths)
    known = [frame_of(others, sum(others) - len(others)), frame_of(lengths, targets)]
    chosen = choose_frame(known, lengths, targets)
    assert chosen is not None
    assert chosen.holds(lengths, targets)
    assert chosen.tokens <= known[1].tokens * 5 // 4


@pytest.mark.parametrize(
    ("lengths", "targets", "expected"),
    [
        ((2048, 2047), 4093, Frame(tokens=4096, targets=4096, sequences=8, longest=2048)),
        ((2048, 2048), 4094, Frame(tokens=4096, targets=4096, sequences=2, longest=2048, is_even=True)),
        ((300,) * 3, 100, Frame(tokens=900, targets=113, sequences=3, longest=300, is_even=True)),
        ((200, 200), 0, Frame(tokens=448, targets=56, sequences=8, longest=256)),
        ((5, 40), 20, Frame(tokens=256, targets=32, sequences=8, longest=128)),
        ((700, 333), 0, Frame(tokens=1280, targets=160, sequences=8, longest=1024)),
        ((1,) * 9, 0, Frame(tokens=256, targets=32, sequences=16, longest=128)),
    ],
)
def test_sizes(lengths: tuple[int, ...], targets: int, expected: Frame) -> None:
    assert frame_of(lengths, targets) == expected


def test_sequences_of_one_length_and_others_have_frames_of_their_own() -> None:
    even, other = (512, 512), (512, 500)
    assert choose_frame([frame_of(other, 900)], even, 900) is None
    assert choose_frame([frame_of(even, 900)], other, 900) is None
    # As many tokens in other sequences.
    assert choose_frame([frame_of((1024,), 900)], even, 900) is None
    assert choose_frame([frame_of(even, 900)], even, 800) == frame_of(even, 900)


def test_what_is_far_too_large_is_not_taken() -> None:
    small = ((100, 120), 200)
    for other in (((900, 100), 990), ((200, 40), 1), ((1,) * 240, 0)):
        assert choose_frame([frame_of(*other)], *small) is None
    assert choose_frame([frame_of((100, 130), 210)], *small) == frame_of((100, 130), 210)
