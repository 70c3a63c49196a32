# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The adapters' own products in Triton, each in the same pass over memory as what must read those rows anyway.

A product with an adapter is narrow: it costs what reading its wide side costs. So the gradient of an output is read
once for both of its products, and those of gates and ups are made while they are in registers. Sums over programs go
through float32 tables and are added in a fixed order. `torch_reference` says what each computes, and does it where that
is as fast: for a single layer, for ranks above `_WIDEST_RANK`, and in float32, which is for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpu_service.engine.fast_path import torch_reference
from gpu_service.engine.fast_path.launching import kernel

_WIDEST_RANK = 32
# Layers begin and end at multiples of this, or else go to the reference too: reads are whole then.
_EVEN_ROWS = 16
# Columns of a slab, by the width that a rank is padded to; a slab's sums stay in registers.
_SLAB_COLUMNS = {16: 256, 32: 128}
_GATE_SLAB_COLUMNS = {16: 128, 32: 128}
_BLOCK_ROWS, _WARPS = 64, 8
_GATE_BLOCK_ROWS, _GATE_WARPS = 16, 4
# Programs that a launch should have: a few for each multiprocessor of a large GPU.
_PROGRAMS = 528
_REDUCED_ROWS = 64


@kernel
def _adapter_backward(
    gradient, right, ranks, of_inner, of_b, table, gradient_row, right_row, ranks_row, num_rows, split_rows,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    slab, split = tl.program_id(0), tl.program_id(1)
    # Layers begin and end at multiples of 16: `prepare_ranks` saw to it.
    first = tl.multiple_of(tl.load(table + 3 * slab), 16)
    end = tl.multiple_of(tl.load(table + 3 * slab + 1), 16)
    first_rank = tl.load(table + 3 * slab + 2)
    column = first + tl.arange(0, COLUMNS)
    rank, near = tl.arange(0, RANK_BLOCK), tl.arange(0, ROWS)
    in_slab, in_rank = column < end, rank < RANK
    weights = tl.load(
        right + column[:, None] * right_row + first_rank + rank[None, :],
        mask=in_slab[:, None] & in_rank[None, :], other=0.0,
    )  # fmt: skip
    total = tl.zeros((COLUMNS, RANK_BLOCK), dtype=tl.float32)
    last = tl.minimum((split + 1) * split_rows, num_rows)
    for start in range(split * split_rows, last, ROWS):
        # 64 bits for where the block of rows begins, 32 within it.
        begin = tl.cast(start, tl.int64)
        inside = start + near < last
        piece = tl.load(
            gradient + begin * gradient_row + (near[:, None] * gradient_row + column[None, :]),
            mask=inside[:, None] & in_slab[None, :], other=0.0,
        )  # fmt: skip
        theirs = tl.load(
            ranks + begin * ranks_row + first_rank + (near[:, None] * ranks_row + rank[None, :]),
            mask=inside[:, None] & in_rank[None, :], other=0.0,
        )  # fmt: skip
        part = tl.dot(piece, weights)
        out = of_inner + (slab.to(tl.int64) * num_rows + begin) * RANK_BLOCK
        tl.store(out + near[:, None] * RANK_BLOCK + rank[None, :], part, mask=inside[:, None])
        total = tl.dot(tl.trans(piece), theirs, total)
    out = of_b + (split * tl.num_programs(0) + slab).to(tl.int64) * COLUMNS * RANK_BLOCK
    tl.store(out + tl.arange(0, COLUMNS)[:, None] * RANK_BLOCK + rank[None, :], total)


@triton.jit
def _once(x):
    """16-bit numbers as they are, but computed once: the compiler else makes them anew in each layout."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)


@kernel
def _gate_adapter_backward(
    gradient, gate_up, right, ranks, of_inner, of_b, gradient_row, gate_row, right_row, ranks_row, num_rows, split_rows,
    slabs, gate_rank, up_rank, WIDTH: tl.constexpr, GATED: tl.constexpr, UPPED: tl.constexpr, RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    slab, split = tl.program_id(0), tl.program_id(1)
    column = slab * COLUMNS + tl.arange(0, COLUMNS)
    rank, near = tl.arange(0, RANK_BLOCK), tl.arange(0, ROWS)
    in_slab, in_rank = column < WIDTH, rank < RANK
    narrow = in_slab[:, None] & in_rank[None, :]
    narrow_place = column[:, None] * right_row + rank[None, :]
    if GATED:
        gate_weights = tl.load(right + narrow_place + gate_rank, mask=narrow, other=0.0)
        gate_total = tl.zeros((COLUMNS, RANK_BLOCK), dtype=tl.float32)
    if UPPED:
        up_weights = tl.load(right + narrow_place + WIDTH * right_row + up_rank, mask=narrow, other=0.0)
        up_total = tl.zeros((COLUMNS, RANK_BLOCK), dtype=tl.float32)
    kind = gate_up.dtype.element_ty
    here = near[:, None] * RANK_BLOCK + rank[None, :]
    last = tl.minimum((split + 1) * split_rows, num_rows)
    for start in range(split * split_rows, last, ROWS):
        begin = tl.cast(start, tl.int64)
        inside = start + near < last
        mask = inside[:, None] & in_slab[None, :]
        at = gate_up + begin * gate_row + (near[:, None] * gate_row + column[None, :])
        wide = tl.load(
            gradient + begin * gradient_row + (near[:, None] * gradient_row + column[None, :]), mask=mask, other=0.0
        ).to(tl.float32)
        gates = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        ups = tl.load(at + WIDTH, mask=mask, other=0.0).to(tl.float32)
        sigmoids = tl.sigmoid(gates)
        of_gates = (wide * ups * sigmoids * (1 + gates * (1 - sigmoids))).to(kind)
        of_ups = (wide * gates * sigmoids).to(kind)
        of_gates, of_ups = _once(of_gates), _once(of_ups)
        tl.store(at, of_gates, mask=mask)
        tl.store(at + WIDTH, of_ups, mask=mask)
        their_mask = inside[:, None] & in_rank[None, :]
        theirs_at = ranks + begin * ranks_row + (near[:, None] * ranks_row + rank[None, :])
        number = slab
        if GATED:
            part = tl.dot(of_gates, gate_weights)
            place = of_inner + (number.to(tl.int64) * num_rows + begin) * RANK_BLOCK
            tl.store(place + here, part, mask=inside[:, None])
            theirs = tl.load(theirs_at + gate_rank, mask=their_mask, other=0.0)
            gate_total = tl.dot(tl.trans(of_gates), theirs, gate_total)
            number += tl.num_programs(0)
        if UPPED:
            part = tl.dot(of_ups, up_weights)
            place = of_inner + (number.to(tl.int64) * num_rows + begin) * RANK_BLOCK
            tl.store(place + here, part, mask=inside[:, None])
            theirs = tl.load(theirs_at + up_rank, mask=their_mask, other=0.0)
            up_total = tl.dot(tl.trans(of_ups), theirs, up_total)
    number = slab
    here = tl.arange(0, COLUMNS)[:, None] * RANK_BLOCK + rank[None, :]
    if GATED:
        tl.store(of_b + (split * slabs + number).to(tl.int64) * COLUMNS * RANK_BLOCK + here, gate_total)
        number += tl.num_programs(0)
    if UPPED:
        tl.store(of_b + (split * slabs + number).to(tl.int64) * COLUMNS * RANK_BLOCK + here, up_total)


@kernel
def _reduce_inner(
    of_inner, inner, bounds, inner_row, num_rows, room,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One part of the ranks of a block of rows; parts that are no layer's have no slabs, and become 0."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    part = tl.program_id(1)
    rank = tl.arange(0, RANK_BLOCK)
    inside = row[:, None] < num_rows
    total = tl.zeros((ROWS, RANK_BLOCK), dtype=tl.float32)
    for slab in range(tl.load(bounds + 2 * part), tl.load(bounds + 2 * part + 1)):
        place = (slab * num_rows + row[:, None]) * RANK_BLOCK + rank[None, :]
        total += tl.load(of_inner + place, mask=inside, other=0.0)
    column = part * RANK + rank
    mask = inside & (rank < RANK)[None, :] & (column < room)[None, :]
    tl.store(inner + row[:, None] * inner_row + column[None, :], total.to(inner.dtype.element_ty), mask=mask)


@kernel
def _reduce_b(
    of_b, gradients, table, starts, splits, scaling,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    slab = tl.program_id(0)
    first, end = tl.load(table + 3 * slab), tl.load(table + 3 * slab + 1)
    column, rank = tl.arange(0, COLUMNS), tl.arange(0, RANK_BLOCK)
    place = column[:, None] * RANK_BLOCK + rank[None, :]
    total = tl.zeros((COLUMNS, RANK_BLOCK), dtype=tl.float32)
    for split in range(splits):
        total += tl.load(of_b + (split * tl.num_programs(0) + slab).to(tl.int64) * COLUMNS * RANK_BLOCK + place)
    mask = (first + column < end)[:, None] & (rank < RANK)[None, :]
    out = gradients + tl.load(starts + slab) + column[:, None] * RANK + rank[None, :]
    tl.store(out, (total * scaling).to(gradients.dtype.element_ty), mask=mask)


@dataclass(frozen=True, kw_only=True)
class _Slabs:
    """A group's columns in slabs, each of one layer: first and last column and first rank, int32 [slabs, 3].

    `starts` is where a slab's B begins in the flat buffer; `bounds` has first and last slab of each part of the margin.
    """

    columns: int
    count: int
    table: torch.Tensor
    starts: torch.Tensor
    bounds: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class _Ranks:
    """What `prepare_ranks` gives. `slabs` is None for what these kernels do not take."""

    reference: torch_reference.Ranks
    block: int
    slabs: _Slabs | None
    gate_slabs: _Slabs | None

    @property
    def takes_gates(self) -> bool:
        return self.gate_slabs is not None


def prepare_ranks(
    parts: Sequence[torch_reference.RankPart], *, rank: int, room: int, scaling: float, device: torch.device
) -> _Ranks:
    reference = torch_reference.prepare_ranks(parts, rank=rank, room=room, scaling=scaling, device=device)
    block = max(16, triton.next_power_of_2(rank))
    even = all(part.first_row % _EVEN_ROWS == 0 and part.num_rows % _EVEN_ROWS == 0 for part in parts)
    if block > _WIDEST_RANK or not even or len(parts) == 1:
        return _Ranks(reference=reference, block=block, slabs=None, gate_slabs=None)
    return _Ranks(
        reference=reference,
        block=block,
        slabs=_cut(reference, _SLAB_COLUMNS[block], device),
        gate_slabs=_cut(reference, _GATE_SLAB_COLUMNS[block], device),
    )


def _cut(ranks: torch_reference.Ranks, columns: int, device: torch.device) -> _Slabs:
    table: list[tuple[int, int, int]] = []
    starts: list[int] = []
    bounds: list[tuple[int, int]] = []
    for part in ranks.parts:
        first_slab = len(table)
        for first in range(0, part.num_rows, columns):
            end = min(first + columns, part.num_rows)
            table.append((part.first_row + first, part.first_row + end, part.first_rank))
            starts.append(part.start_b + first * ranks.rank)
        bounds.append((first_slab, len(table)))
    bounds += [(0, 0)] * (-(-ranks.room // ranks.rank) - len(bounds))
    return _Slabs(
        columns=columns,
        count=len(table),
        table=torch.tensor(table, dtype=torch.int32, device=device),
        starts=torch.tensor(starts, dtype=torch.int64, device=device),
        bounds=torch.tensor(bounds, dtype=torch.int32, device=device),
    )


def _split_rows(rows: int, slabs: int, block_rows: int) -> int:
    """Rows that one program goes through, a multiple of its block."""
    splits = max(1, min(_PROGRAMS // max(slabs, 1), triton.cdiv(rows, 2 * block_rows)))
    return triton.cdiv(triton.cdiv(rows, splits), block_rows) * block_rows


def _reduce(
    ranks: _Ranks, slabs: _Slabs, of_inner: torch.Tensor, of_b: torch.Tensor, inner: torch.Tensor,
    gradients: torch.Tensor, splits: int,
) -> None:  # fmt: skip
    rank, rows = ranks.reference.rank, inner.shape[0]
    _reduce_inner[(triton.cdiv(rows, _REDUCED_ROWS), slabs.bounds.shape[0])](
        of_inner, inner, slabs.bounds, inner.stride(0), rows, ranks.reference.room,
        RANK=rank, RANK_BLOCK=ranks.block, ROWS=_REDUCED_ROWS, num_warps=4,
    )  # fmt: skip
    _reduce_b[(slabs.count,)](
        of_b, gradients, slabs.table, slabs.starts, splits, ranks.reference.scaling,
        RANK=rank, RANK_BLOCK=ranks.block, COLUMNS=slabs.columns, num_warps=4,
    )  # fmt: skip


def adapter_backward(
    gradient: torch.Tensor,
    right: torch.Tensor,
    ranks: torch.Tensor,
    inner: torch.Tensor,
    prepared: _Ranks,
    gradients: torch.Tensor,
) -> None:
    slabs, rows = prepared.slabs, gradient.shape[0]
    if slabs is None or gradient.dtype is torch.float32:
        torch_reference.adapter_backward(gradient, right, ranks, inner, prepared.reference, gradients)
        return
    split_rows = _split_rows(rows, slabs.count, _BLOCK_ROWS)
    splits = triton.cdiv(rows, split_rows)
    of_inner = torch.empty((slabs.count, rows, prepared.block), device=gradient.device, dtype=torch.float32)
    of_b = torch.empty((splits, slabs.count, slabs.columns, prepared.block), device=gradient.device)
    _adapter_backward[(slabs.count, splits)](
        gradient, right, ranks, of_inner, of_b, slabs.table, gradient.stride(0), right.stride(0), ranks.stride(0),
        rows, split_rows, RANK=prepared.reference.rank, RANK_BLOCK=prepared.block, COLUMNS=slabs.columns,
        ROWS=_BLOCK_ROWS, num_warps=_WARPS, num_stages=3,
    )  # fmt: skip
    _reduce(prepared, slabs, of_inner, of_b, inner, gradients, splits)


def weigh_b(gradient: torch.Tensor, ranks: torch.Tensor, prepared: _Ranks, gradients: torch.Tensor) -> None:
    torch_reference.weigh_b(gradient, ranks, prepared.reference, gradients)


def gate_adapter_backward_(
    gradient: torch.Tensor,
    gate_up: torch.Tensor,
    right: torch.Tensor,
    ranks: torch.Tensor,
    inner: torch.Tensor,
    prepared: _Ranks,
    gradients: torch.Tensor,
) -> None:
    slabs, (rows, width) = prepared.gate_slabs, gradient.shape
    assert slabs is not None
    first_ranks = {part.first_row: part.first_rank for part in prepared.reference.parts}
    across = triton.cdiv(width, slabs.columns)
    split_rows = _split_rows(rows, across, _GATE_BLOCK_ROWS)
    splits = triton.cdiv(rows, split_rows)
    of_inner = torch.empty((slabs.count, rows, prepared.block), device=gradient.device, dtype=torch.float32)
    of_b = torch.empty((splits, slabs.count, slabs.columns, prepared.block), device=gradient.device)
    _gate_adapter_backward[(across, splits)](
        gradient, gate_up, right, ranks, of_inner, of_b, gradient.stride(0), gate_up.stride(0), right.stride(0),
        ranks.stride(0), rows, split_rows, slabs.count, first_ranks.get(0, 0), first_ranks.get(width, 0),
        WIDTH=width, GATED=0 in first_ranks, UPPED=width in first_ranks, RANK=prepared.reference.rank,
        RANK_BLOCK=prepared.block, COLUMNS=slabs.columns, ROWS=_GATE_BLOCK_ROWS, num_warps=_GATE_WARPS, num_stages=2,
    )  # fmt: skip
    _reduce(prepared, slabs, of_inner, of_b, inner, gradients, splits)
