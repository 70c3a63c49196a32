"""The whole pass over flat tokens: embedding, blocks, head; and back.

What a block kept is dropped as soon as it is used, and may be less than all of it (`recomputing`). Knows tensors
alone; which model they come from is `model`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gpu_service.domain.recomputation import FULL
from gpu_service.engine.fast_path import sliced_blocks
from gpu_service.engine.fast_path.attention import Bounds
from gpu_service.engine.fast_path.block import Block, Positions
from gpu_service.engine.fast_path.head import Head, KeptHead
from gpu_service.engine.fast_path.offloading import HostShelf
from gpu_service.engine.fast_path.recomputing import Remainder


@dataclass(frozen=True, kw_only=True)
class FlatPass:
    """One pass' tokens [T], targets and labels [K], on the device. `sequences` has each target's sequence, int64 [K].

    `targets_by_sequence` is int64 [S].
    """

    tokens: torch.Tensor
    positions: Positions
    bounds: Bounds
    targets: torch.Tensor
    labels: torch.Tensor
    sequences: torch.Tensor
    targets_by_sequence: torch.Tensor
    # Of the adapters' dropout; None: nothing is dropped.
    key: torch.Tensor | None = None


@dataclass(kw_only=True)
class KeptPass:
    """What a forward pass leaves; entries go as they are used."""

    blocks: list[Remainder]
    head: KeptHead | None


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """`embedding` is [V, H] in the compute type."""

    embedding: torch.Tensor
    blocks: Sequence[Block]
    head: Head
    # How much of each block is made again in the backward pass.
    levels: Sequence[str]
    # Of the feed-forward half of blocks that are recomputed whole.
    slices: int = 1
    # Where inputs of blocks that are recomputed whole wait; None: on the device.
    shelf: HostShelf | None = None

    def forward(self, flat: FlatPass, *, adapted: bool, keeps: bool) -> tuple[torch.Tensor, KeptPass | None]:
        """Nats of each target, float32 [K], and what `backward` needs, if it is to be kept."""
        x, add = self.embedding.index_select(0, flat.tokens), None
        kept: list[Remainder] = []
        if keeps and self.shelf is not None:
            self.shelf.clear()
        for number, block in enumerate(self.blocks):
            if self._is_sliced(number):
                x, add, residual = sliced_blocks.forward(
                    block, x, add, flat.positions, flat.bounds, adapted=adapted, slices=self.slices
                )
                if keeps:
                    kept.append(Remainder.of_input(residual, number, self.shelf))
                del residual
                continue
            x, add, activations = block.forward(x, add, flat.positions, flat.bounds, adapted=adapted)
            if keeps:
                kept.append(Remainder.of(activations, self.levels[number], number, self.shelf))
            del activations
        assert add is not None
        nats, of_head = self.head.forward(x, add, flat.targets, flat.labels, keeps=keeps)
        return nats, None if of_head is None else KeptPass(blocks=kept, head=of_head)

    def backward(self, upstream: torch.Tensor, flat: FlatPass, kept: KeptPass, gradients: torch.Tensor) -> None:
        """`gradients` becomes that of the trained weights; `upstream` [K] is that of each target's nats."""
        rows, hidden = len(flat.tokens), self.embedding.shape[1]
        room = max(max(block.attention_out.room, block.mlp_out.room) for block in self.blocks)
        residual = self.embedding.new_empty((rows, hidden + room))
        assert kept.head is not None
        self.head.backward(upstream, kept.head, flat.targets, residual[:, :hidden])
        kept.head = None
        for number in reversed(range(len(self.blocks))):
            block, remainder = self.blocks[number], kept.blocks.pop()
            if self._is_sliced(number):
                x = remainder.take_input(number, self.shelf)
                sliced_blocks.backward(
                    block, x, residual, flat.positions, flat.bounds, gradients,
                    reaches_input=number > 0, slices=self.slices,
                )  # fmt: skip
                del x, remainder
                continue
            one = remainder.complete(block, number, flat.positions, flat.bounds, self.shelf)
            del remainder
            block.backward(residual, one, flat.positions, flat.bounds, gradients, reaches_input=number > 0)
            del one

    def _is_sliced(self, number: int) -> bool:
        return self.slices > 1 and self.levels[number] == FULL
