# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""What full training does besides the adapters' path, in Triton. Imported on CUDA only.

`full_reference` says what each function computes. Sums over programs go through float32 tables and are added in a fixed
order, so that the same step gives the same bits. Flat buffers may have more than 2^31 elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpu_service.engine.fast_path.full_reference import AdamSettings, StepNumbers, sum_rows
from gpu_service.engine.fast_path.launching import kernel

__all__ = ["add_rows", "step_adamw", "sum_rows", "weigh", "weigh_norm"]

_NORM_COLUMNS, _NORM_ROWS, _NORM_SPLITS = 64, 32, 64
_TABLE_COLUMNS = 1024
_STEP_BLOCK = 1024


def weigh(gradient: torch.Tensor, rows: torch.Tensor, out: torch.Tensor, *, adds: bool) -> None:
    turned = gradient.t()
    if out.dtype is gradient.dtype:
        if adds:
            torch.addmm(out, turned, rows, out=out)
        else:
            torch.mm(turned, rows, out=out)
    elif adds:
        # Added in the accumulator, and never rounded to the compute type.
        torch.ops.aten.addmm.dtype_out(out, turned, rows, out.dtype, out=out)
    else:
        torch.ops.aten.mm.dtype_out(turned, rows, out.dtype, out=out)


@kernel
def _weigh_norm(
    gradient, x, scale, table, gradient_row, x_row, num_rows, split_rows,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    within = column < WIDTH
    start = split * split_rows
    stop = tl.minimum(start + split_rows, num_rows)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = row < stop
        token, head = (row // HEADS).to(tl.int64), row % HEADS
        mask = inside[:, None] & within[None, :]
        place = head[:, None] * WIDTH + column[None, :]
        of_row = tl.load(gradient + token[:, None] * gradient_row + place, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x + token[:, None] * x_row + place, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.load(scale + row, mask=inside, other=0.0)
        total += tl.sum(of_row * (value * inverse[:, None]), axis=0)
    tl.store(table + split * WIDTH + column, total, mask=within)


def weigh_norm(
    gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, *, heads: int, adds: bool
) -> None:
    width, num_rows = out.numel(), x.shape[0] * heads
    # A pass without a target has no rows: its table is one of zeros.
    split_rows = max(triton.cdiv(triton.cdiv(num_rows, _NORM_SPLITS), _NORM_ROWS), 1) * _NORM_ROWS
    splits = max(triton.cdiv(num_rows, split_rows), 1)
    table = torch.empty(splits, width, device=x.device, dtype=torch.float32)
    _weigh_norm[(triton.cdiv(width, _NORM_COLUMNS), splits)](
        gradient, x, scale, table, gradient.stride(0), x.stride(0), num_rows, split_rows,
        WIDTH=width, HEADS=heads, COLUMNS=_NORM_COLUMNS, ROWS=_NORM_ROWS, num_warps=4,
    )  # fmt: skip
    sum_rows(table, out, adds=adds)


@kernel
def _add_rows(gradient, tokens, order, lengths, out, gradient_row, out_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0)
    length = tl.load(lengths + place)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # Of a run of equal tokens the first one's program adds all.
    within = (column < WIDTH) & (length > 0)
    target = out + tl.load(tokens + place).to(tl.int64) * out_row + column
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for number in range(0, length):
        row = tl.load(order + place + number).to(tl.int64)
        total += tl.load(gradient + row * gradient_row + column, mask=within, other=0.0).to(tl.float32)
    before = tl.load(target, mask=within, other=0.0).to(tl.float32)
    tl.store(target, (before + total).to(out.dtype.element_ty), mask=within)


def add_rows(gradient: torch.Tensor, tokens: torch.Tensor, out: torch.Tensor) -> None:
    ordered, order = torch.sort(tokens, stable=True)
    places = torch.arange(len(ordered), device=tokens.device)
    stops = torch.searchsorted(ordered, ordered, right=True)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    lengths = torch.where(is_first, stops - places, 0).to(torch.int32)
    width = gradient.shape[1]
    _add_rows[(len(tokens), triton.cdiv(width, _TABLE_COLUMNS))](
        gradient, ordered, order, lengths, out, gradient.stride(0), out.stride(0),
        WIDTH=width, BLOCK=_TABLE_COLUMNS, num_warps=4,
    )  # fmt: skip


@kernel
def _step_adamw(
    held, working, gradient, first, second, numbers, num_elements, decay, rest1, beta2, rest2, epsilon,
    BLOCK: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    size, inverse_root = tl.load(numbers), tl.load(numbers + 1)
    factor, goes = tl.load(numbers + 2), tl.load(numbers + 3)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (place < num_elements) & (goes > 0)
    of_weight = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32) * factor
    mean = tl.load(first + place, mask=inside, other=0.0)
    mean += (of_weight - mean) * rest1
    square = tl.load(second + place, mask=inside, other=0.0)
    square = square * beta2 + of_weight * of_weight * rest2
    weight = tl.load(held + place, mask=inside, other=0.0) * decay
    weight -= size * mean / (tl.sqrt(square) * inverse_root + epsilon)
    tl.store(first + place, mean, mask=inside)
    tl.store(second + place, square, mask=inside)
    tl.store(held + place, weight, mask=inside)
    if COPIES:
        tl.store(working + place, weight.to(working.dtype.element_ty), mask=inside)


def step_adamw(
    held: torch.Tensor,
    working: torch.Tensor | None,
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    step: StepNumbers,
    settings: AdamSettings,
) -> None:
    num_elements = held.numel()
    _step_adamw[(triton.cdiv(num_elements, _STEP_BLOCK),)](
        held, held if working is None else working, gradient, first, second, step.numbers, num_elements,
        1 - step.learning_rate * settings.weight_decay, 1 - settings.beta1, settings.beta2, 1 - settings.beta2,
        settings.epsilon, BLOCK=_STEP_BLOCK, COPIES=working is not None, num_warps=4,
    )  # fmt: skip
