"""How large the forward passes of a plan are: what the memory of a step depends on. Reads no token and makes no batch.

The passes are the training loop's: a step's examples in order, in runs as long as the micro-batch limits allow.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from gpu_service.domain.defaults import ResolvedBatch


class PassShape(NamedTuple):
    """Tokens of one forward pass, those among them that carry loss, and the tokens of its longest sequence."""

    tokens: int
    targets: int
    longest: int


class ExampleSize(NamedTuple):
    """Tokens of one example, those that carry loss, and those of its longest sequence: a preference pair has two."""

    tokens: int
    targets: int
    longest: int


class LargestPasses:
    """The passes of a plan that no other pass is larger than in every respect, and whether any step has several."""

    def __init__(self, batch: ResolvedBatch) -> None:
        self._max_examples = batch.micro_batch_examples or batch.examples
        self._max_tokens = batch.micro_batch_tokens or batch.tokens
        self._frontier: list[PassShape] = []
        # Those of an evaluation, which keep nothing for a backward pass.
        self._evaluated: list[PassShape] = []
        # Gradients of a step's earlier passes stand while a later one is made.
        self.accumulates = False

    def add_step(self, examples: Iterable[ExampleSize]) -> None:
        """Take in the next step's examples, in order."""
        number = 0
        for shape in self._split(examples):
            number += 1
            self.add(shape)
        self.accumulates = self.accumulates or number > 1

    def add(self, shape: PassShape) -> None:
        """Take in one pass."""
        self._frontier = _with_pass(self._frontier, shape)

    def add_evaluation(self, examples: Iterable[ExampleSize]) -> None:
        """Take in the held-out examples, in order."""
        for shape in self._split(examples):
            self._evaluated = _with_pass(self._evaluated, shape)

    @property
    def shapes(self) -> Sequence[PassShape]:
        return tuple(self._frontier)

    @property
    def evaluated(self) -> Sequence[PassShape]:
        return tuple(self._evaluated)

    def _split(self, examples: Iterable[ExampleSize]) -> Iterator[PassShape]:
        count = tokens = targets = longest = 0
        for size in examples:
            full = (self._max_examples is not None and count >= self._max_examples) or (
                self._max_tokens is not None and tokens + size.tokens > self._max_tokens
            )
            if count and full:
                yield PassShape(tokens, targets, longest)
                count = tokens = targets = longest = 0
            count += 1
            tokens += size.tokens
            targets += size.targets
            longest = max(longest, size.longest)
        if count:
            yield PassShape(tokens, targets, longest)


def largest_possible(batch: ResolvedBatch, max_length: int) -> LargestPasses:
    """Passes of examples of `max_length`, all of whose tokens carry loss: what is known before any data was read."""
    passes = LargestPasses(batch)
    if batch.examples is not None:
        passes.add_step([ExampleSize(max_length, max_length, max_length)] * batch.examples)
    else:
        num_tokens = max(batch.micro_batch_tokens or batch.tokens or max_length, max_length)
        if batch.micro_batch_examples is not None:
            num_tokens = min(num_tokens, batch.micro_batch_examples * max_length)
        passes.add(PassShape(num_tokens, num_tokens, max_length))
        passes.accumulates = num_tokens < (batch.tokens or 0)
    return passes


def _with_pass(frontier: Sequence[PassShape], shape: PassShape) -> list[PassShape]:
    if any(_covers(known, shape) for known in frontier):
        return list(frontier)
    return [*(known for known in frontier if not _covers(shape, known)), shape]


def _covers(larger: PassShape, smaller: PassShape) -> bool:
    return all(left >= right for left, right in zip(larger, smaller, strict=True))
