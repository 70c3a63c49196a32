"""Blocks that are recomputed whole, with their feed-forward half in slices of rows: forward, and made again and back.

Gates, ups and gated rows are several times as wide as the residual stream; here they and their gradients exist for one
slice at a time, while the weights are restored once for all slices. The attention half sees all rows. Which blocks, and
in how many slices, is the plan's decision (`domain.recomputation`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from gpu_service.domain.recomputation import slice_rows
from gpu_service.engine.fast_path.attention import Bounds
from gpu_service.engine.fast_path.block import SECOND, Block, Positions
from gpu_service.engine.fast_path.projection import Projection


def forward(
    block: Block,
    x: torch.Tensor,
    add: torch.Tensor | None,
    positions: Positions,
    bounds: Bounds,
    *,
    adapted: bool,
    slices: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `Block.forward`; in place of what is kept, the block's input [T, H]."""
    added, residual = _attend(block, x, add, positions, bounds, adapted=adapted)
    hidden = x.shape[1]
    middle_normed = block.mlp_in.input_buffer(x.shape[0], x)
    middle, _ = block.operations.add_norm(
        residual, added, block.second_norm, block.shape.epsilon, middle_normed[:, :hidden]
    )
    with _restored(block) as (mlp_in, mlp_out):
        for rows in _cut(x.shape[0], slices):
            with mlp_in.dropout.starting_at(rows.start):
                mlp_out.multiply(
                    _gate(mlp_in, mlp_out, middle_normed[rows], adapted=adapted)[1], added[rows], adapted=adapted
                )
    return middle, added, residual


def backward(
    block: Block,
    x: torch.Tensor,
    residual: torch.Tensor,
    positions: Positions,
    bounds: Bounds,
    gradients: torch.Tensor,
    *,
    reaches_input: bool,
    slices: int,
) -> None:
    """As `Block.backward`, from the block's input `x` [T, H]: all else is made again.

    Of the feed-forward half's adapters each slice's gradient is rounded to the type of `gradients` [n], as a whole
    pass' is; those of the slices are added up in float32, and the sum is rounded once more.
    """
    added, kept = block.attend(x, None, positions, bounds, adapted=True)
    # The cheapest part of it to make once more.
    kept.normed = None
    with _restored(block) as (mlp_in, mlp_out):
        sums = _Sums(gradients, (mlp_in, mlp_out))
        for rows in _cut(x.shape[0], slices):
            with mlp_in.dropout.starting_at(rows.start):
                _slice_backward(block, mlp_in, mlp_out, x[rows], added[rows], residual[rows], gradients)
            sums.add()
        sums.write()
    del added, sums
    block.attend_backward(residual, kept, positions, bounds, gradients, reaches_input=reaches_input)


def _attend(
    block: Block, x: torch.Tensor, add: torch.Tensor | None, positions: Positions, bounds: Bounds, *, adapted: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention adds and the block's input; the rest of what it leaves goes at once."""
    added, attended = block.attend(x, add, positions, bounds, adapted=adapted)
    return added, attended.residual


def _slice_backward(
    block: Block,
    mlp_in: Projection,
    mlp_out: Projection,
    x: torch.Tensor,
    added: torch.Tensor,
    residual: torch.Tensor,
    gradients: torch.Tensor,
) -> None:
    """The feed-forward half of one slice's rows, whose gradient `residual` [t, H + room] has in its first H columns."""
    rows, hidden = x.shape
    normed = mlp_in.input_buffer(rows, x)
    middle, scale = block.operations.add_norm(x, added, block.second_norm, block.shape.epsilon, normed[:, :hidden])
    gate_up, gated = _gate(mlp_in, mlp_out, normed, adapted=True)
    of_gated = x.new_empty((rows, mlp_out.in_features))
    out = residual[:, : hidden + mlp_out.room]
    mlp_out.backward(out, *mlp_out.split(gated), of_gated, gradients)
    del gated
    of_normed = x.new_empty((rows, hidden))
    mlp_in.backward(gate_up, *mlp_in.split(normed), of_normed, gradients, of_gated=of_gated)
    block.back_through_norm(SECOND, of_normed, middle, scale, residual[:, :hidden])


def _gate(
    mlp_in: Projection, mlp_out: Projection, normed: torch.Tensor, *, adapted: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates and ups [t, 2 * I + room] of normed rows, and what is made of them [t, I + room]."""
    gate_up = mlp_in.output_buffer(normed.shape[0], normed)
    mlp_in.forward(normed, gate_up, adapted=adapted)
    gated = mlp_out.input_buffer(normed.shape[0], normed)
    mlp_out.place_gated(gate_up[:, : 2 * mlp_out.in_features], gated, adapted=adapted)
    return gate_up, gated


def _cut(num_rows: int, slices: int) -> Iterator[slice]:
    step = slice_rows(num_rows, slices)
    return (slice(first, min(first + step, num_rows)) for first in range(0, num_rows, step))


@contextmanager
def _restored(block: Block) -> Iterator[tuple[Projection, Projection]]:
    """The feed-forward half's layers, whose weights are restored once for all that is made inside."""
    mlp_in, mlp_out = block.mlp_in, block.mlp_out
    # Of adapters alone: a weight that is trained gets its gradient in one product.
    assert isinstance(mlp_in, Projection)
    assert isinstance(mlp_out, Projection)
    with ExitStack() as stack:
        stack.enter_context(mlp_in.restored())
        stack.enter_context(mlp_out.restored())
        yield mlp_in, mlp_out


class _Sums:
    """The sums of the slices' gradients of these layers' adapters, float32, beside the flat buffer they are made in."""

    def __init__(self, gradients: torch.Tensor, layers: tuple[Projection, ...]) -> None:
        self._places = [gradients[one.adapter.place] for one in layers if one.room]
        self._sums: list[Any] = []

    def add(self) -> None:
        """One slice's gradients stand in the flat buffer."""
        if not self._sums:
            self._sums = [place.to(torch.float32, copy=True) for place in self._places]
            return
        for total, place in zip(self._sums, self._places, strict=True):
            total.add_(place)

    def write(self) -> None:
        """Put the sums in their place."""
        for total, place in zip(self._sums, self._places, strict=True):
            place.copy_(total)
