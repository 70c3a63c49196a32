"""How much of a forward pass is made again in the backward pass on the fast path, layer by layer. Measures nothing.

Three ways to keep less of a layer, each cheaper in memory and dearer in time than the one before. The first layers are
recomputed most: their activations are wanted last, when those of the others are gone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

# Everything is kept.
NONE = "none"
# Normed rows and the product of gate and up projection are made again: no matrix product of the base.
ELEMENTWISE = "elementwise"
# Beside those, the gate and up projections.
FEED_FORWARD = "feed-forward"
# The layer's input alone is kept.
FULL = "full"
# Host memory for a layer's input comes in sizes of which four lie between a power of two and the next, and which are
# multiples of this: locking it takes long, and a pass of a few tokens more seldom needs another place.
_PLACE_BYTES = 4 * 1024**2
_PLACES_A_DOUBLING = 4
# Rows of a slice of the feed-forward half are a multiple of this: tiles of a product are that high.
_SLICE_STEP = 128
# Of the last resort: with more of them the moment that takes the most is another one, and products get slow.
_LEAST_MEMORY_SLICES = 4
# Rows of the head's logits that exist at a time: so many that the product back from them fills a GPU; 0.5 GB at a
# vocabulary of 128,000. Half as many where memory is what counts.
HEAD_ROWS, FEW_HEAD_ROWS = 2048, 1024
# Of the host's memory, what is left to everybody else.
HOST_SPARE_BYTES = 2 * 1024**3


def place_bytes(num_bytes: int) -> int:
    """Host memory that one layer's input of `num_bytes` takes: at most a quarter more, but for small ones."""
    step = max((1 << max(num_bytes - 1, 0).bit_length()) // (2 * _PLACES_A_DOUBLING), _PLACE_BYTES)
    return -(-num_bytes // step) * step


@dataclass(frozen=True, kw_only=True)
class Recomputation:
    """Numbers of layers, in this order from the first one; the rest keep everything.

    `offload`: inputs of the layers that are recomputed whole wait in the host's memory. `feed_forward_slices`: the
    feed-forward half of those layers goes through its rows in so many slices, and the head takes fewer rows at a time;
    results are the same but for the order of sums.
    """

    full_layers: int = 0
    feed_forward_layers: int = 0
    elementwise_layers: int = 0
    offload: bool = False
    feed_forward_slices: int = 1

    @property
    def head_rows(self) -> int:
        """Rows of the head's logits that exist at a time."""
        return HEAD_ROWS if self.feed_forward_slices == 1 else FEW_HEAD_ROWS

    @property
    def num_layers(self) -> int:
        """Layers of which anything is recomputed."""
        return self.full_layers + self.feed_forward_layers + self.elementwise_layers

    def levels(self, num_layers: int) -> tuple[str, ...]:
        """One level a layer, from the first."""
        counted = (
            (FULL, self.full_layers),
            (FEED_FORWARD, self.feed_forward_layers),
            (ELEMENTWISE, self.elementwise_layers),
        )
        levels = [level for level, count in counted for _ in range(count)]
        return tuple([*levels, *[NONE] * num_layers][:num_layers])

    def describe(self, num_layers: int) -> str:
        """For people."""
        counted = (
            (self.full_layers, "whole"),
            (self.feed_forward_layers, "from attention on"),
            (self.elementwise_layers, "but for matrix products"),
        )
        parts = [f"{count} {how}" for count, how in counted if count]
        if not parts:
            return "nothing is recomputed"
        kept = ", their inputs wait in host memory" if self.offload else ""
        if self.feed_forward_slices > 1:
            kept += f", their feed-forward half in {self.feed_forward_slices} slices"
        return f"of {num_layers} layers are recomputed: {', '.join(parts)}{kept}"


NOTHING = Recomputation()


def slice_rows(num_rows: int, slices: int) -> int:
    """Rows of each of so many slices but the last, which may have fewer; of few rows there are fewer slices."""
    return max(-(-num_rows // (slices * _SLICE_STEP)), 1) * _SLICE_STEP


def everything(num_layers: int, *, offload: bool = False, feed_forward_slices: int = 1) -> Recomputation:
    """Every layer, whole."""
    return Recomputation(full_layers=num_layers, offload=offload, feed_forward_slices=feed_forward_slices)


def least_memory(num_layers: int) -> Recomputation:
    """The last resort."""
    return everything(num_layers, offload=True, feed_forward_slices=_LEAST_MEMORY_SLICES)


def step_down(now: Recomputation, num_layers: int, *, may_slice: bool) -> Recomputation | None:
    """The next way to save memory that speaks of every layer alike; None when nothing more can be saved.

    `may_slice`: whether the feed-forward half may go in slices; not where its weights are trained.
    """
    ways = (
        Recomputation(elementwise_layers=num_layers),
        Recomputation(feed_forward_layers=num_layers),
        everything(num_layers),
        everything(num_layers, offload=True),
        *([least_memory(num_layers)] if may_slice else []),
    )
    weights = {NONE: 0, ELEMENTWISE: 1, FEED_FORWARD: 2, FULL: 3}
    least = min(weights[level] for level in now.levels(num_layers))
    if now.offload:
        least = 4 if least == 3 else 3
        least += least == 4 and now.feed_forward_slices >= _LEAST_MEMORY_SLICES
    if least >= len(ways):
        return None
    return replace(ways[least], feed_forward_slices=max(now.feed_forward_slices, ways[least].feed_forward_slices))


def ladder(num_layers: int, *, may_slice: bool) -> Iterator[Recomputation]:
    """From nothing to everything, a layer at a time, in the order of time lost for memory won; `step_down` has the rest
    of it.
    """
    yield NOTHING
    for count in range(1, num_layers + 1):
        yield Recomputation(elementwise_layers=count)
    for count in range(1, num_layers + 1):
        yield Recomputation(feed_forward_layers=count, elementwise_layers=num_layers - count)
    for count in range(1, num_layers + 1):
        yield Recomputation(full_layers=count, feed_forward_layers=num_layers - count)
    yield everything(num_layers, offload=True)
    if may_slice:
        yield least_memory(num_layers)
