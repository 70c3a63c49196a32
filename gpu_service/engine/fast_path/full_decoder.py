"""The whole pass over flat tokens where every weight is trained: embedding, blocks, head; and back to the embedding.

The counterpart of `decoder`. A backward pass that is not the last over the same activations leaves them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gpu_service.engine.fast_path.decoder import FlatPass
from gpu_service.engine.fast_path.full_block import FullBlock
from gpu_service.engine.fast_path.full_head import FullHead, KeptFullHead, Upstream
from gpu_service.engine.fast_path.full_weights import Region
from gpu_service.engine.fast_path.offloading import HostShelf
from gpu_service.engine.fast_path.recomputing import Remainder
from gpu_service.engine.fast_path.weight_gradients import Gradients


@dataclass(kw_only=True)
class KeptFullPass:
    """What a forward pass leaves."""

    blocks: list[Remainder]
    head: KeptFullHead | None


@dataclass(frozen=True, kw_only=True)
class FullDecoder:
    """`embedding` is [V, H] in the compute type, `embedding_region` its place."""

    embedding: torch.Tensor
    embedding_region: Region
    blocks: Sequence[FullBlock]
    head: FullHead
    gradients: Gradients
    # The module of kernels of full training.
    kernels: Any
    # How much of each block is made again in the backward pass.
    levels: Sequence[str]
    # Where inputs of blocks that are recomputed whole wait; None: on the device.
    shelf: HostShelf | None = None

    def forward(self, flat: FlatPass, *, keeps: bool) -> tuple[torch.Tensor, KeptFullPass | None]:
        """Nats of each target, float32 [K], and what `backward` needs, if it is to be kept."""
        x, add = self.embedding.index_select(0, flat.tokens), None
        kept: list[Remainder] = []
        if keeps and self.shelf is not None:
            self.shelf.clear()
        for number, block in enumerate(self.blocks):
            x, add, activations = block.forward(x, add, flat.positions, flat.bounds, adapted=True)
            if keeps:
                kept.append(Remainder.of(activations, self.levels[number], number, self.shelf))
            del activations
        assert add is not None
        nats, of_head = self.head.forward(x, add, flat.targets, flat.labels, keeps=keeps)
        return nats, None if of_head is None else KeptFullPass(blocks=kept, head=of_head)

    def backward(self, upstream: Upstream, flat: FlatPass, kept: KeptFullPass, *, is_last: bool = True) -> None:
        """Make every weight's gradient; `upstream` is that of each target's nats.

        `kept` is used up, unless it is not the last pass over it; that must be one whose blocks are recomputed whole.
        """
        rows, hidden = len(flat.tokens), self.embedding.shape[1]
        residual = self.embedding.new_empty((rows, hidden))
        # A block of adapters wants a buffer for their gradients; these know places of their own.
        no_adapters = residual.new_empty(0)
        self.gradients.begin()
        assert kept.head is not None
        self.head.backward(upstream, kept.head, flat.targets, residual)
        if is_last:
            kept.head = None
        for number in reversed(range(len(self.blocks))):
            block = self.blocks[number]
            remainder = kept.blocks.pop() if is_last else kept.blocks[number]
            one = remainder.complete(block, number, flat.positions, flat.bounds, self.shelf)
            del remainder
            block.backward(residual, one, flat.positions, flat.bounds, no_adapters, reaches_input=True)
            del one
        place = self.gradients.place(self.embedding_region)
        if not place.adds:
            # Few tokens of the vocabulary are in a pass.
            place.tensor.zero_()
        self.kernels.add_rows(residual, flat.tokens, place.tensor)
        self.gradients.complete(self.embedding_region)
        self.gradients.end()
