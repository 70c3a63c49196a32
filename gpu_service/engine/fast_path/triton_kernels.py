# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The kernels of the fast path in Triton. Imported on CUDA only; `torch_reference` says what each computes.

One program a row, or a block of one. Rows may lie further apart than they are wide. Number types come from the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from gpu_service.engine.fast_path.adapter_kernels import (
    adapter_backward,
    gate_adapter_backward_,
    prepare_ranks,
    weigh_b,
)
from gpu_service.engine.fast_path.fp8_kernels import (
    bound_ranks,
    gate_and_round,
    multiply_rounded,
    prepare_bounds,
    prepare_rounded,
    round_out,
    round_rows,
    round_weights,
)
from gpu_service.engine.fast_path.fp8_rank_kernels import rank_and_round, rank_beside, rank_rows
from gpu_service.engine.fast_path.launching import kernel

__all__ = [
    "adapter_backward",
    "add_norm",
    "bound_ranks",
    "copy_out",
    "cross_entropy_",
    "gate",
    "gate_adapter_backward_",
    "gate_and_round",
    "gate_backward_",
    "head_norm",
    "head_norm_backward",
    "multiply_rounded",
    "nf4_dequantize",
    "norm_backward_",
    "prepare_bounds",
    "prepare_copies",
    "prepare_ranks",
    "prepare_rounded",
    "rank_and_round",
    "rank_beside",
    "rank_rows",
    "rotate",
    "round_out",
    "round_rows",
    "round_weights",
    "weigh_b",
]

_GATE_BLOCK = 4096
_LOSS_BLOCK = 8192
_PACKED_BLOCK = 1024
_COPY_BLOCK = 4096


@kernel
def _add_norm(
    x, add, total, weight, out, scale, epsilon, x_row, add_row, total_row, out_row,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, head = program // HEADS, program % HEADS
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = head * WIDTH + column
    value = tl.load(x + row * x_row + place, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        value += tl.load(add + row * add_row + place, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * total_row + place, rounded, mask=inside)
        value = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value) / WIDTH + epsilon)
    tl.store(scale + program, inverse)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_row + place, (value * inverse * factor).to(out.dtype.element_ty), mask=inside)


@kernel
def _norm_backward(
    gradient, x, weight, scale, out, gradient_row, x_row, out_row,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADDS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, head = program // HEADS, program % HEADS
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = head * WIDTH + column
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    scaled = tl.load(gradient + row * gradient_row + place, mask=inside, other=0.0).to(tl.float32) * factor
    inverse = tl.load(scale + program)
    normed = tl.load(x + row * x_row + place, mask=inside, other=0.0).to(tl.float32) * inverse
    through = inverse * (scaled - normed * (tl.sum(scaled * normed) / WIDTH))
    if ADDS:
        through += tl.load(out + row * out_row + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_row + place, through.to(out.dtype.element_ty), mask=inside)


@kernel
def _rotate(
    x, cosines, sines, positions, out, x_row, out_row,
    HEADS: tl.constexpr, HEAD_BLOCK: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row).to(tl.int64)
    head = tl.arange(0, HEAD_BLOCK)[:, None]
    column = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < HEADS) & (column < HALF)
    cosine = tl.load(cosines + position * HALF + column, mask=column < HALF, other=0.0)
    sine = tl.load(sines + position * HALF + column, mask=column < HALF, other=0.0) * SIGN
    place = head * 2 * HALF + column
    low = tl.load(x + row * x_row + place, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + row * x_row + place + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_row + place, (low * cosine - high * sine).to(out.dtype.element_ty), mask=inside)
    tl.store(out + row * out_row + place + HALF, (high * cosine + low * sine).to(out.dtype.element_ty), mask=inside)


@kernel
def _gate(gate_up, out, in_row, out_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gates = tl.load(gate_up + row * in_row + column, mask=inside, other=0.0).to(tl.float32)
    ups = tl.load(gate_up + row * in_row + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_row + column, (gates * tl.sigmoid(gates) * ups).to(out.dtype.element_ty), mask=inside)


@kernel
def _gate_backward(gradient, gate_up, gradient_row, in_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    wide = tl.load(gradient + row * gradient_row + column, mask=inside, other=0.0).to(tl.float32)
    gates = tl.load(gate_up + row * in_row + column, mask=inside, other=0.0).to(tl.float32)
    ups = tl.load(gate_up + row * in_row + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    sigmoids = tl.sigmoid(gates)
    of_gate = wide * ups * sigmoids * (1 + gates * (1 - sigmoids))
    kind = gate_up.dtype.element_ty
    tl.store(gate_up + row * in_row + column, of_gate.to(kind), mask=inside)
    tl.store(gate_up + row * in_row + WIDTH + column, (wide * gates * sigmoids).to(kind), mask=inside)


@kernel
def _cross_entropy(logits, labels, nats, row_stride, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * row_stride
    label = tl.load(labels + row)
    # Before anything is written over it.
    at_label = tl.load(start + label).to(tl.float32)
    column = tl.arange(0, BLOCK)
    highest = -float("inf")
    total = 0.0
    for first in range(0, VOCABULARY, BLOCK):
        value = tl.load(start + first + column, mask=first + column < VOCABULARY, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(value))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(value - higher))
        highest = higher
    normalizer = highest + tl.log(total)
    tl.store(nats + row, normalizer - at_label)
    for first in range(0, VOCABULARY, BLOCK):
        inside = first + column < VOCABULARY
        value = tl.load(start + first + column, mask=inside, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(value - normalizer) - tl.where(first + column == label, 1.0, 0.0)
        tl.store(start + first + column, gradient.to(logits.dtype.element_ty), mask=inside)


@kernel
def _nf4_dequantize(
    packed, codes, scales, nested_codes, nested_scales, offset, out, out_row,
    ROW_BYTES: tl.constexpr, NUM_BYTES, BLOCK: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    # 32 bits suffice: no matrix has 2^31 weights, and dividing by a row is cheaper in them.
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < NUM_BYTES
    pair = tl.load(packed + place, mask=inside, other=0).to(tl.int32)
    block = place // 32
    if NESTED:
        code = tl.load(scales + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(nested_codes + code) * tl.load(nested_scales + block // 256, mask=inside, other=0.0)
        scale = scale + tl.load(offset)
    else:
        scale = tl.load(scales + block, mask=inside, other=0.0)
    first = tl.load(codes + (pair >> 4)) * scale
    second = tl.load(codes + (pair & 15)) * scale
    kind = out.dtype.element_ty
    values = tl.interleave(first.to(kind), second.to(kind))
    element = tl.program_id(0) * BLOCK * 2 + tl.arange(0, BLOCK * 2)
    row, column = element // (ROW_BYTES * 2), element % (ROW_BYTES * 2)
    tl.store(out + row.to(tl.int64) * out_row + column, values, mask=element < NUM_BYTES * 2)


@kernel
def _copy_out(
    flat, blocks, starts, addresses, sizes, widths, strides, factors, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    part = tl.load(blocks + 2 * tl.program_id(0))
    element = tl.load(blocks + 2 * tl.program_id(0) + 1) + tl.arange(0, BLOCK)
    width = tl.load(widths + part)
    inside = element < tl.load(sizes + part)
    value = tl.load(flat + tl.load(starts + part) + element, mask=inside, other=0.0) * tl.load(factors + part)
    target = tl.load(addresses + part).to(tl.pointer_type(KIND))
    place = (element // width).to(tl.int64) * tl.load(strides + part) + element % width
    tl.store(target + place, value.to(KIND), mask=inside)


def _warps(width: int) -> int:
    return 1 if width <= 256 else 4 if width <= 2048 else 8


def add_norm(
    x: torch.Tensor, add: torch.Tensor | None, weight: torch.Tensor, epsilon: float, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = x.shape
    scale = torch.empty(rows, device=x.device, dtype=torch.float32)
    other = x if add is None else add
    total = x if add is None else torch.empty((rows, width), device=x.device, dtype=x.dtype)
    _add_norm[(rows,)](
        x, other, total, weight, out, scale, epsilon, x.stride(0), other.stride(0), total.stride(0), out.stride(0),
        WIDTH=width, BLOCK=triton.next_power_of_2(width), ADDS=add is not None, HEADS=1, num_warps=_warps(width),
    )  # fmt: skip
    return total, scale


def norm_backward_(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    residual: torch.Tensor,
    *,
    adds: bool,
) -> None:
    rows, width = x.shape
    _norm_backward[(rows,)](
        gradient, x, weight, scale, residual, gradient.stride(0), x.stride(0), residual.stride(0),
        WIDTH=width, BLOCK=triton.next_power_of_2(width), ADDS=adds, HEADS=1, num_warps=_warps(width),
    )  # fmt: skip


def head_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, out: torch.Tensor, *, heads: int) -> torch.Tensor:
    rows, width = x.shape[0], weight.numel()
    scale = torch.empty(rows * heads, device=x.device, dtype=torch.float32)
    _add_norm[(rows * heads,)](
        x, x, x, weight, out, scale, epsilon, x.stride(0), x.stride(0), x.stride(0), out.stride(0),
        WIDTH=width, BLOCK=triton.next_power_of_2(width), ADDS=False, HEADS=heads, num_warps=_warps(width),
    )  # fmt: skip
    return scale


def head_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, *, heads: int
) -> None:
    rows, width = x.shape[0], weight.numel()
    _norm_backward[(rows * heads,)](
        gradient, x, weight, scale, out, gradient.stride(0), x.stride(0), out.stride(0),
        WIDTH=width, BLOCK=triton.next_power_of_2(width), ADDS=False, HEADS=heads, num_warps=_warps(width),
    )  # fmt: skip


def rotate(
    x: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
    *,
    heads: int,
    backward: bool,
) -> None:
    half = cosines.shape[1]
    _rotate[(x.shape[0],)](
        x, cosines, sines, positions, out, x.stride(0), out.stride(0),
        HEADS=heads, HEAD_BLOCK=triton.next_power_of_2(heads), HALF=half, HALF_BLOCK=triton.next_power_of_2(half),
        SIGN=-1.0 if backward else 1.0, num_warps=4,
    )  # fmt: skip


def gate(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    rows, width = out.shape
    block = min(_GATE_BLOCK, triton.next_power_of_2(width))
    _gate[(rows, triton.cdiv(width, block))](
        gate_up, out, gate_up.stride(0), out.stride(0), WIDTH=width, BLOCK=block, num_warps=8
    )


def gate_backward_(gradient: torch.Tensor, gate_up: torch.Tensor) -> None:
    rows, width = gradient.shape
    block = min(_GATE_BLOCK, triton.next_power_of_2(width))
    _gate_backward[(rows, triton.cdiv(width, block))](
        gradient, gate_up, gradient.stride(0), gate_up.stride(0), WIDTH=width, BLOCK=block, num_warps=8
    )


def cross_entropy_(logits: torch.Tensor, labels: torch.Tensor, nats: torch.Tensor) -> None:
    rows, vocabulary = logits.shape
    block = min(_LOSS_BLOCK, triton.next_power_of_2(vocabulary))
    _cross_entropy[(rows,)](
        logits, labels, nats, logits.stride(0), VOCABULARY=vocabulary, BLOCK=block, num_warps=16 if block > 2048 else 4
    )


def nf4_dequantize(
    packed: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    nested_codes: torch.Tensor | None,
    nested_scales: torch.Tensor | None,
    offset: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    num_bytes = packed.numel()
    nested = nested_codes is not None
    # Products and sums are rounded one by one, as bitsandbytes rounds them: fusing them would change last bits.
    _nf4_dequantize[(triton.cdiv(num_bytes, _PACKED_BLOCK),)](
        packed, codes, scales, nested_codes if nested else codes, nested_scales if nested else codes,
        offset if nested else codes, out, out.stride(0),
        ROW_BYTES=out.shape[1] // 2, NUM_BYTES=num_bytes, BLOCK=_PACKED_BLOCK, NESTED=nested,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Copies:
    """Tables on the device, one entry a matrix; `blocks` has a matrix and its first element for every program.

    `matrices` keeps what is written to alive: the tables hold addresses.
    """

    matrices: tuple[torch.Tensor, ...]
    blocks: torch.Tensor
    starts: torch.Tensor
    addresses: torch.Tensor
    sizes: torch.Tensor
    widths: torch.Tensor
    strides: torch.Tensor
    factors: torch.Tensor
    kind: tl.dtype


_KINDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def prepare_copies(copies: Sequence[tuple[int, torch.Tensor, float]]) -> _Copies:
    matrices = tuple(matrix for _, matrix, _ in copies)
    device = matrices[0].device
    blocks = [
        (number, first) for number, matrix in enumerate(matrices) for first in range(0, matrix.numel(), _COPY_BLOCK)
    ]

    def table(values: Sequence[int] | Sequence[float] | Sequence[tuple[int, int]], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return _Copies(
        matrices=matrices,
        blocks=table(blocks, torch.int32),
        starts=table([start for start, _, _ in copies], torch.int64),
        addresses=table([matrix.data_ptr() for matrix in matrices], torch.int64),
        sizes=table([matrix.numel() for matrix in matrices], torch.int32),
        widths=table([matrix.shape[1] for matrix in matrices], torch.int32),
        strides=table([matrix.stride(0) for matrix in matrices], torch.int64),
        factors=table([factor for _, _, factor in copies], torch.float32),
        kind=_KINDS[matrices[0].dtype],
    )


def copy_out(flat: torch.Tensor, prepared: _Copies) -> None:
    _copy_out[(len(prepared.blocks),)](
        flat, prepared.blocks, prepared.starts, prepared.addresses, prepared.sizes, prepared.widths, prepared.strides,
        prepared.factors, KIND=prepared.kind, BLOCK=_COPY_BLOCK, num_warps=4,
    )  # fmt: skip
