"""Finds the passes of a plan that need the most memory, for a probe to make them. Makes none itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpu_service.domain.planned_data import ExampleReference, PlannedData
from gpu_service.engine.training.batches import MicroBatchLimit, split

# Among so many examples the largest passes of a run show; looking at more takes seconds.
_EXAMPLES_LOOKED_AT = 1_000_000


@dataclass(frozen=True, kw_only=True)
class LargestStep:
    """A step from 0, the tokens of all of it and of its longest example."""

    step: int
    step_tokens: int
    longest_tokens: int


@dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """What the largest steps came to: the device's peak, and what the one with the most tokens in a pass was."""

    peak_bytes: int
    step_tokens: int
    longest_tokens: int


def find_largest_steps(data: PlannedData, limit: MicroBatchLimit) -> list[LargestStep]:
    """The step whose largest pass has the most tokens, then that with the most targets, if it is another one."""
    by_tokens: tuple[tuple[int, int], int] = ((-1, -1), 0)
    by_targets: tuple[tuple[int, int], int] = ((-1, -1), 0)
    seen = 0
    for step in range(data.num_steps):
        references = data.step_examples(step)
        for part in split(data, references, limit):
            tokens, targets = _size(data, part)
            by_tokens = max(by_tokens, ((tokens, targets), -step))
            by_targets = max(by_targets, ((targets, tokens), -step))
        seen += len(references)
        if seen >= _EXAMPLES_LOOKED_AT:
            break
    steps = dict.fromkeys((-by_tokens[1], -by_targets[1]))
    return [_describe(data, step) for step in steps]


def find_largest_held_out(data: PlannedData, limit: MicroBatchLimit) -> list[list[ExampleReference]]:
    """The evaluation's pass with the most tokens, then that with the most targets, if it is another one."""
    passes = list(split(data, data.held_out_examples()[:_EXAMPLES_LOOKED_AT], limit))
    if not passes:
        return []
    sizes = [_size(data, part) for part in passes]
    by_tokens = max(range(len(passes)), key=lambda place: sizes[place])
    by_targets = max(range(len(passes)), key=lambda place: sizes[place][::-1])
    return [passes[place] for place in dict.fromkeys((by_tokens, by_targets))]


def _size(data: PlannedData, part: Sequence[ExampleReference]) -> tuple[int, int]:
    """Tokens and targets of one pass."""
    examples = [data.example(one) for one in part]
    tokens = sum(len(example.tokens) for example in examples)
    return tokens, sum(bytes(example.mask).count(1) for example in examples)


def _describe(data: PlannedData, step: int) -> LargestStep:
    lengths = [len(data.example(one).tokens) for one in data.step_examples(step)]
    return LargestStep(step=step, step_tokens=sum(lengths), longest_tokens=max(lengths))
