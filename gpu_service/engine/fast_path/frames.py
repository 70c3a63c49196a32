"""Which sizes of passes are recorded: a pass is filled up to a frame, so that many passes are one recording's.

Pure arithmetic on sizes; knows no tensor. What the filling is made of, and that it counts for nothing, is `graphs`'
business.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# A quarter of a power of two: no pass grows by more than a fourth of itself, but for the smallest.
_STEPS_PER_DOUBLING = 4
_FEWEST_TOKENS, _TOKEN_STEP = 256, 64
# Targets are an eighth of the tokens, or two, and so on: the head costs as much as many layers of a small model.
_TARGET_PARTS = 8
_FEWEST_SEQUENCES = 8
# The smallest of a frame's longest sequences.
SHORTEST = 128
# How much larger than its own a frame may be that a pass is put into because it was recorded already.
_SEQUENCES_AND_LENGTH_BEYOND = 4
# Sequences of one length have kernels of their own from this length on, which take no others.
SHORTEST_EVEN = 256


@dataclass(frozen=True, order=True, kw_only=True)
class Frame:
    """What a recording is made for: exactly so many tokens and targets, at most so many sequences of such a length.

    `is_even`: exactly so many, each of exactly that length.
    """

    tokens: int
    targets: int
    sequences: int
    longest: int
    is_even: bool = False

    def fill(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """`lengths` and those of the sequences that make up for what is missing: `tokens` together."""
        missing = self.tokens - sum(lengths)
        whole, rest = divmod(missing, self.longest)
        return (*lengths, *[self.longest] * whole, *([rest] if rest else []))

    def holds(self, lengths: Sequence[int], num_targets: int) -> bool:
        """Whether a pass of these sequences can be filled up to it; an even one takes its own kind alone."""
        if self.is_even:
            return tuple(lengths) == (self.longest,) * self.sequences and num_targets <= self.targets
        return (
            sum(lengths) <= self.tokens
            and num_targets <= self.targets
            and max(lengths) <= self.longest
            and len(self.fill(lengths)) <= self.sequences
        )

    def is_near(self, own: Frame) -> bool:
        """Whether a pass whose own frame is `own` costs little more in this one."""
        return (
            self.tokens * _STEPS_PER_DOUBLING <= own.tokens * (_STEPS_PER_DOUBLING + 1)
            and self.targets <= own.targets + own.tokens // _TARGET_PARTS
            and self.sequences <= own.sequences * _SEQUENCES_AND_LENGTH_BEYOND
            and self.longest <= own.longest * _SEQUENCES_AND_LENGTH_BEYOND
        )


def frame_of(lengths: Sequence[int], num_targets: int) -> Frame:
    """The smallest frame for a pass of these sequences."""
    is_even = min(lengths) == max(lengths) >= SHORTEST_EVEN
    tokens = sum(lengths) if is_even else _round_up(sum(lengths))
    part = -(-tokens // _TARGET_PARTS)
    targets = max(-(-num_targets // part), 1) * part
    if is_even:
        return Frame(tokens=tokens, targets=targets, sequences=len(lengths), longest=lengths[0], is_even=True)
    longest = _power_of_two(max(SHORTEST, *lengths))
    frame = Frame(tokens=tokens, targets=targets, sequences=0, longest=longest)
    sequences = _power_of_two(max(_FEWEST_SEQUENCES, len(frame.fill(lengths))))
    return Frame(tokens=tokens, targets=targets, sequences=sequences, longest=longest)


def choose_frame(known: Iterable[Frame], lengths: Sequence[int], num_targets: int) -> Frame | None:
    """The smallest of the `known` frames that holds such a pass without much waste; None where none does."""
    own = frame_of(lengths, num_targets)
    alike = (one for one in known if one.is_even == own.is_even and one.is_near(own))
    return min((one for one in alike if one.holds(lengths, num_targets)), default=None)


def _round_up(num_tokens: int) -> int:
    if num_tokens <= _FEWEST_TOKENS:
        return _FEWEST_TOKENS
    step = max(_power_of_two(num_tokens) // 2 // _STEPS_PER_DOUBLING, _TOKEN_STEP)
    return -(-num_tokens // step) * step


def _power_of_two(number: int) -> int:
    """The smallest that is not below `number`."""
    return 1 << (number - 1).bit_length()
