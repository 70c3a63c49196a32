"""The token stream: seeded, of the lengths it says, whole steps."""

from __future__ import annotations

import statistics

from benchmarks.peers.rows import DENSE_LENGTH
from benchmarks.peers.stream import SHORTEST, draw_lengths, draw_texts


def test_dense_rows_are_of_one_length() -> None:
    assert draw_lengths("dense", 5 * DENSE_LENGTH) == [DENSE_LENGTH] * 5


def test_mixed_rows_are_log_normal_and_clipped() -> None:
    lengths = draw_lengths("mixed", 640 * 496)
    assert min(lengths) >= SHORTEST
    assert max(lengths) <= DENSE_LENGTH
    assert 320 < statistics.median(lengths) < 380
    assert sum(lengths) >= 640 * 496


def test_the_stream_is_the_same_each_time() -> None:
    assert draw_lengths("mixed", 10_000) == draw_lengths("mixed", 10_000)
    texts = list(draw_texts([3, 5]))
    assert list(map(len, texts)) == [3, 5]
    assert texts == list(draw_texts([3, 5]))
    assert texts != list(draw_texts([3, 5], seed=1))
