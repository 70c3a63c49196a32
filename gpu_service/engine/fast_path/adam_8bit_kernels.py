# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""A step of AdamW with moments of 8 bits in Triton, one pass over memory. Imported on CUDA only.

`adam_8bit` says what it computes, and how chance rounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gpu_service.engine.fast_path.adam_8bit import BLOCK, FIRST_CODES, SECOND_CODES
from gpu_service.engine.fast_path.full_reference import AdamSettings, StepNumbers
from gpu_service.engine.fast_path.launching import kernel

# Blocks of a program.
_BLOCKS = 4


@triton.jit
def _mix(word):
    word = word ^ (word >> 16)
    word = word * 0x7FEB352D
    word = word ^ (word >> 15)
    word = word * 0x846CA68B
    return word ^ (word >> 16)


@kernel
def _step_adamw_8bit(
    weights, gradient, codes_first, scales_first, codes_second, scales_second, numbers, key,
    first_element, num_elements, decay, rest1, beta2, rest2, epsilon,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    size, inverse_root = tl.load(numbers), tl.load(numbers + 1)
    factor, goes = tl.load(numbers + 2), tl.load(numbers + 3)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    place = block.to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (place < num_elements) & (goes > 0)
    is_block = (block.to(tl.int64) * BLOCK < num_elements) & (goes > 0)
    of_weight = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32) * factor

    scale = tl.load(scales_first + block, mask=is_block, other=0.0)[:, None]
    code = tl.load(codes_first + place, mask=inside, other=0).to(tl.float32) / FIRST
    mean = code * tl.abs(code) * scale
    mean += (of_weight - mean) * rest1
    scale = tl.load(scales_second + block, mask=is_block, other=0.0)[:, None]
    code = tl.load(codes_second + place, mask=inside, other=0).to(tl.float32) / SECOND
    root = code * code * scale
    square = root * root * beta2 + of_weight * of_weight * rest2
    root = tl.sqrt(square)

    start = first_element + place
    high, low = ((start >> 32) & 0xFFFFFFFF).to(tl.uint32), (start & 0xFFFFFFFF).to(tl.uint32)
    word = _mix(_mix(tl.load(key).to(tl.uint32) ^ _mix(high)) ^ (low * 0x85EBCA77))
    other = _mix(word ^ 0x9E3779B9)

    value = tl.load(weights + place, mask=inside, other=0.0).to(tl.float32) * decay
    value -= size * mean / (root * inverse_root + epsilon)
    if ROUNDS:
        bits = value.to(tl.uint32, bitcast=True) + (word & 0xFFFF)
        value = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    tl.store(weights + place, value.to(weights.dtype.element_ty), mask=inside)

    largest = tl.max(tl.abs(mean), axis=1)
    tl.store(scales_first + block, largest, mask=is_block)
    spot = FIRST * tl.sqrt(tl.abs(mean) / tl.maximum(largest, 1e-30)[:, None])
    below = tl.minimum(tl.floor(spot), FIRST - 1.0)
    chance = ((other & 0xFFFF).to(tl.float32) + 0.5) / 65536
    rises = chance < (spot * spot - below * below) / (2 * below + 1)
    code = tl.where(rises, below + 1, below)
    tl.store(codes_first + place, tl.where(mean < 0, -code, code).to(tl.int8), mask=inside)

    largest = tl.max(root, axis=1)
    tl.store(scales_second + block, largest, mask=is_block)
    spot = SECOND * tl.sqrt(root / tl.maximum(largest, 1e-30)[:, None])
    below = tl.minimum(tl.floor(spot), SECOND - 1.0)
    low_power, high_power = below * below * below * below, (below + 1) * (below + 1) * (below + 1) * (below + 1)
    chance = ((other >> 16).to(tl.float32) + 0.5) / 65536
    rises = chance < (spot * spot * spot * spot - low_power) / (high_power - low_power)
    code = tl.where(rises, below + 1, below)
    code = tl.maximum(code, tl.where(square > 0, 1.0, 0.0))
    tl.store(codes_second + place, code.to(tl.uint8), mask=inside)


def step_adamw_8bit(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    step: StepNumbers,
    settings: AdamSettings,
    *,
    key: torch.Tensor,
    first_element: int,
) -> None:
    num_elements = weights.numel()
    _step_adamw_8bit[(triton.cdiv(num_elements, BLOCK * _BLOCKS),)](
        weights, gradient, *moments, step.numbers, key, first_element, num_elements,
        1 - step.learning_rate * settings.weight_decay, 1 - settings.beta1, settings.beta2, 1 - settings.beta2,
        settings.epsilon, BLOCK=BLOCK, BLOCKS=_BLOCKS, FIRST=FIRST_CODES, SECOND=SECOND_CODES,
        ROUNDS=weights.dtype is not torch.float32, num_warps=4,
    )  # fmt: skip
