# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Products in 8 bits on CUDA: rounding of rows in Triton, cuBLAS' product, and the adapter's part added to it.

`torch_reference` says what each computes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpu_service.engine.fast_path import torch_reference
from gpu_service.engine.fast_path.launching import kernel

_LARGEST = tl.constexpr(448.0)
_SMALLEST = tl.constexpr(1e-12)
_ADD_ROWS, _ADD_COLUMNS = 64, 128
_WIDEST_ROOM = 128


@kernel
def _round_rows(x, values, scales, x_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    wide = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    # Divided as the processor divides: an approximation would round some values to their neighbor.
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(wide)), _SMALLEST), _LARGEST)
    tl.store(scales + row, scale)
    tl.store(values + row * WIDTH + column, tl.div_rn(wide, scale).to(tl.float8e4nv), mask=inside)


@kernel
def _add_ranks(
    product, ranks, weights, out, product_row, ranks_row, weights_row, weights_column, out_row, num_rows, width,
    ROOM: tl.constexpr, ROOM_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    begin = (tl.program_id(0) * ROWS).to(tl.int64)
    near, rank = tl.arange(0, ROWS), tl.arange(0, ROOM_BLOCK)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside, in_width, in_room = begin + near < num_rows, column < width, rank < ROOM
    mask = inside[:, None] & in_width[None, :]
    theirs = tl.load(
        ranks + begin * ranks_row + (near[:, None] * ranks_row + rank[None, :]),
        mask=inside[:, None] & in_room[None, :], other=0.0,
    )  # fmt: skip
    factors = tl.load(
        weights + rank[:, None] * weights_row + column[None, :] * weights_column,
        mask=in_room[:, None] & in_width[None, :], other=0.0,
    )  # fmt: skip
    place = begin * product_row + (near[:, None] * product_row + column[None, :])
    total = tl.dot(theirs, factors) + tl.load(product + place, mask=mask, other=0.0).to(tl.float32)
    place = begin * out_row + (near[:, None] * out_row + column[None, :])
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = x.shape
    values = torch.empty((rows, width), device=x.device, dtype=torch.float8_e4m3fn)
    scales = torch.empty((rows, 1), device=x.device, dtype=torch.float32)
    _round_rows[(rows,)](
        x, values, scales, x.stride(0), WIDTH=width, BLOCK=triton.next_power_of_2(width),
        num_warps=16 if width > 8192 else 8,
    )  # fmt: skip
    return values, scales


def multiply_rounded(
    values: torch.Tensor,
    scales: torch.Tensor,
    weights: torch.Tensor,
    weight_scales: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    # Scales of rows are offered for this type alone.
    product = torch._scaled_mm(
        values, weights.t(), scales, weight_scales.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return product.to(dtype)


def add_ranks(product: torch.Tensor, ranks: torch.Tensor, weights: torch.Tensor | None, out: torch.Tensor) -> None:
    if weights is None or weights.shape[0] > _WIDEST_ROOM or out.dtype is torch.float32:
        torch_reference.add_ranks(product, ranks, weights, out)
        return
    (rows, width), room = out.shape, weights.shape[0]
    _add_ranks[(triton.cdiv(rows, _ADD_ROWS), triton.cdiv(width, _ADD_COLUMNS))](
        product, ranks, weights, out, product.stride(0), ranks.stride(0), weights.stride(0), weights.stride(1),
        out.stride(0), rows, width, ROOM=room, ROOM_BLOCK=triton.next_power_of_2(room), ROWS=_ADD_ROWS,
        COLUMNS=_ADD_COLUMNS, num_warps=4,
    )  # fmt: skip
