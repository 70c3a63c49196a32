"""The whole pass over flat tokens: embedding, blocks, head; and back.

What a block kept is dropped as soon as it is used. Knows tensors alone; which model they
come from is `model`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gpu_service.engine.fast_path.attention import Bounds
from gpu_service.engine.fast_path.block import Block, Kept, Positions
from gpu_service.engine.fast_path.head import Head, KeptHead


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


@dataclass(kw_only=True)
class KeptPass:
    """What a forward pass leaves. A block's entry is its inputs where it is recomputed; entries go as they are used."""

    blocks: list[Kept | tuple[torch.Tensor, torch.Tensor | None]]
    head: KeptHead


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """`embedding` is [V, H] in the compute type."""

    embedding: torch.Tensor
    blocks: Sequence[Block]
    head: Head
    # Keep a block's inputs alone, and make its activations again in the backward pass.
    recomputes: bool

    def forward(self, flat: FlatPass, *, adapted: bool, keeps: bool) -> tuple[torch.Tensor, KeptPass | None]:
        """Nats of each target, float32 [K], and what `backward` needs, if it is to be kept."""
        x, add = self.embedding.index_select(0, flat.tokens), None
        kept: list[Kept | tuple[torch.Tensor, torch.Tensor | None]] = []
        for block in self.blocks:
            inputs = (x, add)
            x, add, activations = block.forward(x, add, flat.positions, flat.bounds, adapted=adapted)
            if keeps:
                kept.append(inputs if self.recomputes else activations)
            del activations, inputs
        assert add is not None
        nats, of_head = self.head.forward(x, add, flat.targets, flat.labels, keeps=keeps)
        return nats, None if of_head is None else KeptPass(blocks=kept, head=of_head)

    def backward(self, upstream: torch.Tensor, flat: FlatPass, kept: KeptPass, gradients: torch.Tensor) -> None:
        """`gradients` becomes that of the trained weights; `upstream` [K] is that of each target's nats."""
        rows, hidden = len(flat.tokens), self.embedding.shape[1]
        room = max(max(block.attention_out.room, block.mlp_out.room) for block in self.blocks)
        residual = self.embedding.new_empty((rows, hidden + room))
        self.head.backward(upstream, kept.head, flat.targets, residual[:, :hidden])
        for number in reversed(range(len(self.blocks))):
            block, one = self.blocks[number], kept.blocks.pop()
            if isinstance(one, tuple):
                _, _, one = block.forward(*one, flat.positions, flat.bounds, adapted=True)
            block.backward(residual, one, flat.positions, flat.bounds, gradients, reaches_input=number > 0)
            del one
