"""AdamW over bfloat16 weights with moments of 8 bits, as the kernels (`adam_8bit_kernels`) make it, in plain torch.

Weights and moments are rounded up or down by chance, so that what is expected of them is what they were before: a
change that is smaller than a step of the type is made now and then instead of never. Chance is a function of a key, an
element's number and nothing else, so the same step gives the same bits again. A block of 256 elements shares a scale,
its largest; the first moment is its square times a sign, the second the fourth power, of evenly spaced codes: fine
steps near zero, and none that a float32 could not tell from it.
"""

from __future__ import annotations

import torch

from gpu_service.engine.fast_path.dropout import mix
from gpu_service.engine.fast_path.full_reference import AdamSettings, StepNumbers

BLOCK = 256
# The largest codes.
FIRST_CODES, SECOND_CODES = 127, 255
_WORD = 0xFFFFFFFF
_HALF = 0xFFFF


def read_first(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """First moments [n], float32, of codes int8 [n] and scales [n / 256, rounded up]."""
    places = codes.float() / FIRST_CODES
    return places * places.abs() * _spread(scales, len(codes))


def read_second(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Second moments, of codes uint8; the scales are of their roots."""
    roots = (codes.float() / SECOND_CODES).square() * _spread(scales, len(codes))
    return roots.square()


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
    """A step on `weights` [n], of which `first_element`, a multiple of 256, is the first one's number in the model.

    `moments` are codes int8 [n] and scales float32 [n / 256, rounded up] of the first moment, then codes uint8 and
    scales of the second. `key` int64 [1] is the step's own.
    """
    size, inverse_root, factor, goes = step.numbers.unbind()
    wide = gradient.float() * factor
    codes_first, scales_first, codes_second, scales_second = moments
    first = read_first(codes_first, scales_first)
    first = first + (wide - first) * (1 - settings.beta1)
    second = read_second(codes_second, scales_second)
    second = second * settings.beta2 + wide * wide * (1 - settings.beta2)
    updated = weights.float() * (1 - step.learning_rate * settings.weight_decay)
    updated = updated - size * first / (second.sqrt() * inverse_root + settings.epsilon)
    words = _draw(key, first_element, len(weights))
    others = mix(words ^ 0x9E3779B9)
    new = (
        (weights, _round(updated, words & _HALF, weights.dtype)),
        (scales_first, _largest(first.abs())),
        (scales_second, _largest(second.sqrt())),
    )
    codes = (
        (codes_first, _code_first(first, new[1][1], others & _HALF)),
        (codes_second, _code_second(second, new[2][1], others >> 16)),
    )
    for buffer, value in (*new, *codes):
        buffer.copy_(torch.where(goes > 0, value, buffer))


def _spread(scales: torch.Tensor, count: int) -> torch.Tensor:
    return scales.repeat_interleave(BLOCK)[:count]


def _largest(values: torch.Tensor) -> torch.Tensor:
    missing = -len(values) % BLOCK
    return torch.nn.functional.pad(values, (0, missing)).view(-1, BLOCK).amax(1)


def _draw(key: torch.Tensor, first_element: int, count: int) -> torch.Tensor:
    """A word of 32 bits for each element, in int64."""
    element = torch.arange(first_element, first_element + count, device=key.device)
    start = mix((key ^ mix((element >> 32) & _WORD)) & _WORD)
    return mix(start ^ ((element * 0x85EBCA77) & _WORD))


def _round(values: torch.Tensor, chance: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To `dtype`: up or down to bfloat16 by 16 bits of chance, as they are to float32."""
    if dtype is torch.float32:
        return values
    bits = values.view(torch.int32).to(torch.int64) & _WORD
    bits = (bits + chance) & 0xFFFF0000
    signed = torch.where(bits > 0x7FFFFFFF, bits - 0x100000000, bits)
    return signed.to(torch.int32).view(torch.float32).to(dtype)


def _code_first(values: torch.Tensor, scales: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    place = FIRST_CODES * (values.abs() / _spread(scales, len(values)).clamp(min=1e-30)).sqrt()
    below = place.floor().clamp(max=FIRST_CODES - 1)
    rises = (chance.float() + 0.5) / 65536 < (place * place - below * below) / (2 * below + 1)
    return ((below + rises) * values.sign()).to(torch.int8)


def _code_second(values: torch.Tensor, scales: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    place = SECOND_CODES * (values.sqrt() / _spread(scales, len(values)).clamp(min=1e-30)).sqrt()
    below = place.floor().clamp(max=SECOND_CODES - 1)
    low, high = below.square().square(), (below + 1).square().square()
    rises = (chance.float() + 0.5) / 65536 < (place.square().square() - low) / (high - low)
    # Never zero where something was: what is divided by its root would be without bound.
    return torch.maximum(below + rises, (values > 0).float()).to(torch.uint8)
