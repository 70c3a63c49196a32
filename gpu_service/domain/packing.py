"""Which examples make a step of at most so many tokens: best fit in a window of the seeded order. Reads no data.

A window is 1,024 examples of an epoch's order. Its examples are placed from the longest to the shortest, each in the
step in which it leaves the least room. The step with the most room left is then carried on: the next window fills it
up. The others are put in a seeded order, because they were made with the longest examples first.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gpu_service.domain.order import Permutation, epoch_order

WINDOW_EXAMPLES = 1024
# Part of every data digest: raise it when the same examples would make other steps.
PACKING_VERSION = "best-fit-1024-1"


@dataclass(frozen=True, kw_only=True)
class PackedRun:
    """Step s has the places `places[offsets[s]:offsets[s + 1]]` of the selection, in the order in which they came."""

    places: "array[int]"
    offsets: "array[int]"

    @property
    def num_steps(self) -> int:
        return len(self.offsets) - 1


@dataclass(slots=True)
class _Step:
    free_tokens: int
    # Positions in the run's order; the carried step's come before the window's.
    places: list[tuple[int, int]]


class TooManyExamples(Exception):
    """The run has more examples than the limit that the caller gave."""


def pack(
    num_tokens: Sequence[int],
    *,
    tokens_per_step: int,
    seed: int,
    total_examples: int | None,
    num_steps: int | None,
    most_examples: int,
) -> PackedRun:
    """Steps of a run over a selection whose examples have these tokens; either its examples or its steps are given.

    Steps run on across the ends of epochs, so that only the last of `total_examples` may be left with room for more.
    Each example of an epoch is in one step. Raises `ValueError` when an example is longer than a step,
    `TooManyExamples` for a run of more than `most_examples`.
    """
    if max(num_tokens, default=0) > tokens_per_step or not num_tokens:
        raise ValueError("an example is longer than a step, or there is none")
    places, offsets = array("I"), array("Q", [0])
    carried: _Step | None = None
    for number, (first, window, is_last) in enumerate(_windows(len(num_tokens), seed=seed, total=total_examples)):
        begun = carried
        steps = _place(window, first, num_tokens, tokens_per_step, begun)
        carried = None if is_last else _choose_carried(steps, begun)
        for step in _arrange(steps, begun, carried, seed=seed, number=number):
            places.extend(place for _, place in sorted(step.places))
            offsets.append(len(places))
            if len(places) > most_examples:
                raise TooManyExamples
            if num_steps is not None and len(offsets) > num_steps:
                return PackedRun(places=places, offsets=offsets)
    return PackedRun(places=places, offsets=offsets)


def _windows(length: int, *, seed: int, total: int | None) -> Iterator[tuple[int, list[int], bool]]:
    """Position of its first example in the run, places, and whether it is the last; no end without `total`."""
    epoch = 0
    while True:
        order = epoch_order(length, seed=seed, epoch=epoch)
        begin = epoch * length
        stop = length if total is None else min(length, total - begin)
        for start in range(0, stop, WINDOW_EXAMPLES):
            end = min(start + WINDOW_EXAMPLES, stop)
            yield begin + start, list(order.read(start, end)), begin + end == total
        epoch += 1
        if total is not None and epoch * length >= total:
            return


def _place(
    window: Sequence[int], first: int, num_tokens: Sequence[int], tokens_per_step: int, carried: _Step | None
) -> list[_Step]:
    """Best fit, longest first; of two steps with the same room the one that got it earlier."""
    steps = [] if carried is None else [carried]
    # Room left, ascending, and the step that has it; full steps are not there.
    rooms = [step.free_tokens for step in steps]
    open_steps = list(steps)
    lengths = [num_tokens[place] for place in window]
    shortest = min(lengths)
    for at in sorted(range(len(window)), key=lambda index: -lengths[index]):
        length = lengths[at]
        found = bisect_left(rooms, length)
        if found < len(rooms):
            step = open_steps.pop(found)
            del rooms[found]
        else:
            step = _Step(tokens_per_step, [])
            steps.append(step)
        step.places.append((first + at, window[at]))
        step.free_tokens -= length
        if step.free_tokens >= shortest:
            found = bisect_right(rooms, step.free_tokens)
            rooms.insert(found, step.free_tokens)
            open_steps.insert(found, step)
    return steps


def _choose_carried(steps: Sequence[_Step], begun: _Step | None) -> _Step | None:
    """The least filled, that the next window fills up; one that was carried is done, but where there is no other."""
    candidates = [step for step in steps if step is not begun] or steps
    step = max(candidates, key=lambda step: step.free_tokens)
    return step if step.free_tokens else None


def _arrange(
    steps: Sequence[_Step], begun: _Step | None, carried: _Step | None, *, seed: int, number: int
) -> Iterator[_Step]:
    """The steps that are done, in seeded order; the one that the window before began comes first."""
    if begun is not None and begun is not carried:
        yield begun
    rest = [step for step in steps if step is not begun and step is not carried]
    for position in Permutation(len(rest), seed=seed, purpose=f"steps {number}"):
        yield rest[position]
