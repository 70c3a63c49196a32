"""Which places of the selection make a step. Knows no example and no token.

A batch of examples needs no file: steps are cut from the seeded order of the epochs. Those of a batch of tokens were
decided by `domain.packing` and are read from the plan directory.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from gpu_service.domain.order import Permutation, epoch_order


class PlannedSteps(Protocol):
    """Steps from 0 to `num_steps` - 1; `step` is not checked."""

    num_steps: int
    total_examples: int

    def places(self, step: int) -> Iterable[int]:
        """The places of the selection that the step trains on, in their order."""
        ...

    def count_examples(self, steps: int) -> int:
        """Examples of the first `steps` steps."""
        ...


class CountedSteps:
    """Steps of so many examples each, on across the ends of epochs. Safe to read from several threads."""

    def __init__(self, *, examples_per_epoch: int, batch_examples: int, total_examples: int, seed: int) -> None:
        self.num_steps = -(-total_examples // batch_examples)
        self.total_examples = total_examples
        self._examples_per_epoch = examples_per_epoch
        self._batch_examples = batch_examples
        self._seed = seed
        self._epoch_order: tuple[int, Permutation] | None = None

    def places(self, step: int) -> list[int]:
        places: list[int] = []
        position, end = self.count_examples(step), self.count_examples(step + 1)
        while position < end:
            epoch, place = divmod(position, self._examples_per_epoch)
            count = min(end - position, self._examples_per_epoch - place)
            places.extend(self._order(epoch).read(place, place + count))
            position += count
        return places

    def count_examples(self, steps: int) -> int:
        return min(steps * self._batch_examples, self.total_examples)

    def _order(self, epoch: int) -> Permutation:
        # Read into a local: another thread may put another epoch here at any time.
        cached = self._epoch_order
        if cached is None or cached[0] != epoch:
            cached = (epoch, epoch_order(self._examples_per_epoch, seed=self._seed, epoch=epoch))
            self._epoch_order = cached
        return cached[1]


class ListedSteps:
    """Steps whose places are listed: `places[offsets[step]:offsets[step + 1]]`."""

    def __init__(self, *, places: Sequence[int], offsets: Sequence[int]) -> None:
        self.num_steps = len(offsets) - 1
        self.total_examples = len(places)
        self._places = places
        self._offsets = offsets

    def places(self, step: int) -> Sequence[int]:
        return self._places[self._offsets[step] : self._offsets[step + 1]]

    def count_examples(self, steps: int) -> int:
        return self._offsets[min(steps, self.num_steps)]
