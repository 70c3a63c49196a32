# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Dropout of adapters in Triton. Imported on CUDA only; `dropout` says what each function computes.

Masks are made in registers, of the words that `dropout.keep_mask` makes. For ranks up to 64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpu_service.engine.fast_path.dropout import threshold
from gpu_service.engine.fast_path.launching import kernel

_ROWS, _COLUMNS = 64, 64


@triton.jit
def _mix(word):
    word = word ^ (word >> 16)
    word = word * 0x7FEB352D
    word = word ^ (word >> 15)
    word = word * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def _start(key, layer):
    """Of one layer in one pass."""
    value = tl.load(key)
    low = (value & 0xFFFFFFFF).to(tl.uint32)
    high = ((value >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return _mix(low ^ _mix(high + layer.to(tl.uint32) * 0x9E3779B9))


@triton.jit
def _kept(start, row, column, limit):
    of_row = _mix(start ^ (row.to(tl.uint32) * 0x85EBCA77))
    word = _mix(of_row[:, None] ^ (column.to(tl.uint32) * 0xC2B2AE3D)[None, :])
    return word >= limit.to(tl.uint32)


@kernel
def _drop_and_rank(
    rows, below, out, key, num_rows, rows_row, below_row, out_row, first_row, first_layer, limit, factor,
    num_ranks, room,
    WIDTH: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    start = _start(key, first_layer + part)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank, near = tl.arange(0, RANK_BLOCK), tl.arange(0, COLUMNS)
    inside = row < num_rows
    wide_row = row.to(tl.int64)[:, None]
    total = tl.zeros((ROWS, RANK_BLOCK), dtype=tl.float32)
    for first in range(0, WIDTH, COLUMNS):
        column = first + near
        within = column < WIDTH
        value = tl.load(rows + wide_row * rows_row + column[None, :], mask=inside[:, None] & within[None, :], other=0.0)
        value = tl.where(_kept(start, first_row + row, column, limit), value, 0.0).to(rows.dtype.element_ty)
        weights = tl.load(
            below + (part * RANK + rank)[None, :] * below_row + column[:, None],
            mask=(rank < RANK)[None, :] & within[:, None], other=0.0,
        )  # fmt: skip
        total = tl.dot(value, weights, total, input_precision=PRECISION)
    place = out + wide_row * out_row
    kind = out.dtype.element_ty
    tl.store(
        place + (part * RANK + rank)[None, :], (total * factor).to(kind), mask=inside[:, None] & (rank < RANK)[None, :]
    )
    if part == 0:
        # The margin's other columns meet zeros, and must be numbers.
        for first in range(num_ranks, room, RANK_BLOCK):
            column = first + rank
            tl.store(
                place + column[None, :], tl.zeros((ROWS, RANK_BLOCK), dtype=kind),
                mask=inside[:, None] & (column < room)[None, :],
            )  # fmt: skip


@kernel
def _drop_and_weigh(
    inner, rows, out, key, num_rows, inner_row, rows_row, first_row, first_layer, limit, factor,
    WIDTH: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    start = _start(key, first_layer + part)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rank, near = tl.arange(0, RANK_BLOCK), tl.arange(0, ROWS)
    within = column < WIDTH
    total = tl.zeros((RANK_BLOCK, COLUMNS), dtype=tl.float32)
    for first in range(0, num_rows, ROWS):
        row = first + near
        inside = row < num_rows
        wide_row = row.to(tl.int64)
        value = tl.load(
            rows + wide_row[:, None] * rows_row + column[None, :], mask=inside[:, None] & within[None, :], other=0.0
        )
        value = tl.where(_kept(start, first_row + row, column, limit), value, 0.0).to(rows.dtype.element_ty)
        theirs = tl.load(
            inner + wide_row[None, :] * inner_row + (part * RANK + rank)[:, None],
            mask=inside[None, :] & (rank < RANK)[:, None], other=0.0,
        )  # fmt: skip
        total = tl.dot(theirs, value, total, input_precision=PRECISION)
    place = out + (part * RANK + rank).to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(place, (total * factor).to(out.dtype.element_ty), mask=(rank < RANK)[:, None] & within[None, :])


@kernel
def _drop_and_add(
    inner, below, out, key, num_rows, inner_row, below_row, out_row, first_row, first_layer, limit, factor,
    WIDTH: tl.constexpr, LAYERS: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANK_BLOCK)
    inside, within = row < num_rows, column < WIDTH
    wide_row = row.to(tl.int64)[:, None]
    mask = inside[:, None] & within[None, :]
    place = out + wide_row * out_row + column[None, :]
    total = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    for part in range(LAYERS):
        theirs = tl.load(
            inner + wide_row * inner_row + (part * RANK + rank)[None, :],
            mask=inside[:, None] & (rank < RANK)[None, :], other=0.0,
        )  # fmt: skip
        weights = tl.load(
            below + (part * RANK + rank)[:, None] * below_row + column[None, :],
            mask=(rank < RANK)[:, None] & within[None, :], other=0.0,
        )  # fmt: skip
        through = tl.dot(theirs, weights, input_precision=PRECISION) * factor
        total += tl.where(_kept(_start(key, first_layer + part), first_row + row, column, limit), through, 0.0)
    tl.store(place, total.to(out.dtype.element_ty), mask=mask)


def _options(x: torch.Tensor, rank: int) -> dict[str, object]:
    return {
        "RANK": rank,
        "RANK_BLOCK": max(16, triton.next_power_of_2(rank)),
        "ROWS": _ROWS,
        "COLUMNS": _COLUMNS,
        "PRECISION": "ieee" if x.dtype is torch.float32 else "tf32",
        "num_warps": 4,
    }


def drop_and_rank(
    rows: torch.Tensor,
    below: torch.Tensor,
    out: torch.Tensor,
    key: torch.Tensor,
    *,
    first_row: int,
    first_layer: int,
    num_layers: int,
    rank: int,
    probability: float,
) -> None:
    count, width = rows.shape
    _drop_and_rank[(triton.cdiv(count, _ROWS), num_layers)](
        rows, below, out, key, count, rows.stride(0), below.stride(0), out.stride(0), first_row, first_layer,
        threshold(probability), 1 / (1 - probability), num_layers * rank, out.shape[1], WIDTH=width,
        **_options(rows, rank),
    )  # fmt: skip


def drop_and_weigh(
    inner: torch.Tensor,
    rows: torch.Tensor,
    out: torch.Tensor,
    key: torch.Tensor,
    *,
    first_row: int,
    first_layer: int,
    num_layers: int,
    rank: int,
    probability: float,
) -> None:
    count, width = rows.shape
    _drop_and_weigh[(triton.cdiv(width, _COLUMNS), num_layers)](
        inner, rows, out, key, count, inner.stride(0), rows.stride(0), first_row, first_layer,
        threshold(probability), 1 / (1 - probability), WIDTH=width, **_options(rows, rank),
    )  # fmt: skip


def drop_and_add(
    inner: torch.Tensor,
    below: torch.Tensor,
    out: torch.Tensor,
    key: torch.Tensor,
    *,
    first_row: int,
    first_layer: int,
    num_layers: int,
    rank: int,
    probability: float,
) -> None:
    count, width = out.shape
    _drop_and_add[(triton.cdiv(count, _ROWS), triton.cdiv(width, _COLUMNS))](
        inner, below, out, key, count, inner.stride(0), below.stride(0), out.stride(0), first_row, first_layer,
        threshold(probability), 1 / (1 - probability), WIDTH=width, LAYERS=num_layers, **_options(out, rank),
    )  # fmt: skip
