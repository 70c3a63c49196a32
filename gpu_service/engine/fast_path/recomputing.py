"""What a block's forward pass left, made smaller for the time until it is wanted, and made whole again then.

Made whole it is the same to the last bit: the same kernels see the same numbers. Which block keeps how little is the
plan's decision (`domain.recomputation`); what a block keeps at most is the block's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from gpu_service.domain.recomputation import ELEMENTWISE, FEED_FORWARD, FULL, NONE
from gpu_service.engine.fast_path.attention import Bounds
from gpu_service.engine.fast_path.block import FIRST, SECOND, Block, Kept, Positions
from gpu_service.engine.fast_path.offloading import HostShelf

_ELEMENTWISE = frozenset({"normed", "middle_normed", "gated"})
_DROPPED: Mapping[str, frozenset[str]] = {
    NONE: frozenset(),
    ELEMENTWISE: _ELEMENTWISE,
    FEED_FORWARD: _ELEMENTWISE | {"gate_up"},
}


@dataclass(frozen=True, kw_only=True)
class Remainder:
    """What stays of a block's `Kept`, by name; of a block that is recomputed whole, its input alone."""

    level: str
    parts: Mapping[str, Any]

    @classmethod
    def of(cls, kept: Kept, level: str, number: int, shelf: HostShelf | None) -> Remainder:
        """`number` is the block's; with a `shelf` the input of a block that is recomputed whole is put on it."""
        if level == FULL:
            return cls.of_input(kept.residual, number, shelf)
        dropped = _DROPPED[level]
        return cls(
            level=level,
            parts={field.name: getattr(kept, field.name) for field in fields(kept) if field.name not in dropped},
        )

    @classmethod
    def of_input(cls, residual: torch.Tensor, number: int, shelf: HostShelf | None) -> Remainder:
        """Of a block that is recomputed whole: its input [T, H]."""
        if shelf is None:
            return cls(level=FULL, parts={"residual": residual})
        shelf.put(number, residual)
        return cls(level=FULL, parts={})

    def take_input(self, number: int, shelf: HostShelf | None) -> torch.Tensor:
        """What `of_input` was given."""
        residual: torch.Tensor = self.parts["residual"] if shelf is None else shelf.take(number)
        return residual

    def complete(
        self, block: Block, number: int, positions: Positions, bounds: Bounds, shelf: HostShelf | None
    ) -> Kept:
        """All of it again."""
        if self.level == FULL:
            residual = self.take_input(number, shelf)
            _, _, kept = block.forward(residual, None, positions, bounds, adapted=True, completes=False)
            return kept
        if self.level == NONE:
            return Kept(**self.parts)
        return Kept(**self.parts, **_make_again(block, self.parts, self.level))


def _make_again(block: Block, parts: Mapping[str, Any], level: str) -> dict[str, Any]:
    made = {
        "normed": block.norm_input(FIRST, parts["residual"]),
        "middle_normed": block.norm_input(SECOND, parts["middle"]),
    }
    rows = parts["residual"].shape[0]
    gate_up = parts.get("gate_up")
    if level == FEED_FORWARD:
        gate_up = made["gate_up"] = block.mlp_in.output_buffer(rows, parts["residual"])
        block.mlp_in.forward(made["middle_normed"], gate_up, adapted=True)
    assert gate_up is not None
    gated = made["gated"] = block.mlp_out.input_buffer(rows, parts["residual"])
    block.mlp_out.place_gated(gate_up[:, : 2 * block.mlp_out.in_features], gated, adapted=True)
    return made
