# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Quantizing to NF4 in Triton. Imported on CUDA only; `quantizing` says what each computes, and is the reference.

The last bit decides at a bound: reciprocals are the device's approximation, flushed to zero, as in the library, whose
kernels are compiled for fast mathematics. So a block of zeros has the first code: nothing is above any bound there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK_WEIGHTS = 64
_NESTED_BLOCK = 256
# Blocks of 64 weights that one program quantizes.
_BLOCKS = 16


@triton.jit
def _reciprocal(x):
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit(do_not_specialize=["num_blocks"])
def _quantize_values(
    values, bounds, packed, scales, num_blocks, BLOCKS: tl.constexpr, NUM_BOUNDS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = (block < num_blocks)[:, None]
    element = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    value = tl.load(values + element, mask=inside, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(value), axis=1)
    scaled = value * _reciprocal(scale)[:, None]
    place = tl.zeros([BLOCKS, 64], tl.int32)
    for bound in tl.static_range(NUM_BOUNDS):
        place += (scaled > tl.load(bounds + bound)).to(tl.int32)
    first, second = tl.split(tl.reshape(place, (BLOCKS, 32, 2)))
    pair = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(packed + pair, (first * 16 + second).to(tl.uint8), mask=inside)
    tl.store(scales + block, scale, mask=block < num_blocks)


@triton.jit(do_not_specialize=["num_scales"])
def _quantize_scales(scales, offset, bounds, places, nested, num_scales, BLOCK: tl.constexpr):
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < num_scales
    value = tl.load(scales + element, mask=inside, other=0.0) - tl.load(offset)
    value = tl.where(inside, value, 0.0)
    scale = tl.max(tl.abs(value), axis=0)
    scaled = value * _reciprocal(scale + tl.zeros([BLOCK], tl.float32))
    # How many of the 255 bounds lie below, found by halving.
    place = tl.zeros([BLOCK], tl.int32)
    step = BLOCK // 2
    for _ in tl.static_range(8):
        place = tl.where(scaled > tl.load(bounds + place + step - 1), place + step, place)
        step = step // 2
    tl.store(places + element, place.to(tl.uint8), mask=inside)
    tl.store(nested + tl.program_id(0), scale)


def quantize_values(values: torch.Tensor, bounds: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> None:
    num_blocks = values.numel() // _BLOCK_WEIGHTS
    _quantize_values[(triton.cdiv(num_blocks, _BLOCKS),)](
        values, bounds, packed, scales, num_blocks, BLOCKS=_BLOCKS, NUM_BOUNDS=len(bounds), num_warps=4
    )


def quantize_scales(
    scales: torch.Tensor, offset: torch.Tensor, bounds: torch.Tensor, places: torch.Tensor, nested: torch.Tensor
) -> None:
    num_scales = scales.numel()
    _quantize_scales[(triton.cdiv(num_scales, _NESTED_BLOCK),)](
        scales, offset, bounds, places, nested, num_scales, BLOCK=_NESTED_BLOCK, num_warps=4
    )
