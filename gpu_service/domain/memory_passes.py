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
        # The largest pass of an evaluation, which keeps nothing for a backward pass.
        self.evaluated: PassShape | None = None
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
        if any(_covers(known, shape) for known in self._frontier):
            return
        self._frontier = [known for known in self._frontier if not _covers(shape, known)]
        self._frontier.append(shape)

    def add_evaluation(self, longest_tokens: int) -> None:
        """Passes of held-out examples that may be as long as this; 0: there are none."""
        tokens = longest_tokens * (self._max_examples or 1)
        if self._max_tokens is not None:
            tokens = max(longest_tokens, min(tokens if self._max_examples else self._max_tokens, self._max_tokens))
        self.evaluated = PassShape(tokens, tokens, longest_tokens) if tokens else None

    @property
    def shapes(self) -> Sequence[PassShape]:
        return tuple(self._frontier)

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


def _covers(larger: PassShape, smaller: PassShape) -> bool:
    return all(left >= right for left, right in zip(larger, smaller, strict=True))
