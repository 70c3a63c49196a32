"""Weights to NF4 with double quantization, to the same bits as bitsandbytes, in plain torch on any device.

Blocks of 64 weights share a scale; 256 scales, less their mean, share one of their own. Holds for the versions that
`nf4.TESTED_VERSIONS` names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpu_service.engine.fast_path.nf4 import BLOCK_WEIGHTS, NESTED_BLOCK, NotNf4

# Quantiles of a normal distribution, scaled to [-1, 1], with an exact 0 (Dettmers et al. 2023, arXiv:2305.14314).
NF4_CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_DECADES = 7
_SMALLEST = 1e-38


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Two weights a byte [N * K / 2, 1], the first in the high half; scales as places in `nested_codes`, or float32."""

    packed: torch.Tensor
    scales: torch.Tensor
    nested_scales: torch.Tensor | None
    offset: torch.Tensor | None


def quantize(weight: torch.Tensor, *, double: bool) -> Quantized:
    """`weight` [N, K] with K a multiple of 64; of 16 bits on CUDA. Raises NotNf4 for any other.

    In float32 the library's CUDA kernels divide approximately: a value at a bound may fall on either side of it.
    """
    if weight.device.type == "cuda" and weight.dtype is torch.float32:
        raise NotNf4("weights in float32 are quantized by the library alone")
    if weight.ndim != 2 or weight.shape[1] % BLOCK_WEIGHTS:
        raise NotNf4(f"a weight of shape {tuple(weight.shape)} is no whole number of blocks a row")
    codes = torch.tensor(NF4_CODES, device=weight.device)
    places, scales = _quantize_blocks(weight, codes, BLOCK_WEIGHTS)
    if weight.device.type == "cuda":
        # The library's kernels have the first code in a block of zeros, where its CPU code has that of 0.
        places = places.view(-1, BLOCK_WEIGHTS).masked_fill(scales[:, None] == 0, 0).view(-1)
    packed = (places[::2] << 4 | places[1::2])[:, None]
    if not double:
        return Quantized(packed=packed, scales=scales, nested_scales=None, offset=None)
    offset = scales.mean()
    nested, nested_scales = _quantize_blocks(scales - offset, nested_codes(weight.device), NESTED_BLOCK)
    return Quantized(packed=packed, scales=nested, nested_scales=nested_scales, offset=offset)


def nested_codes(device: torch.device) -> torch.Tensor:
    """256 signed values: in each of seven decades twice as many as in the one below, evenly spread, 0 and 1."""
    values: list[float] = [0.0, 1.0]
    for decade in range(_DECADES):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        scaled = (10.0 ** (decade - _DECADES + 1) * middles).tolist()
        values += [*scaled, *(-value for value in scaled)]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def _quantize_blocks(values: torch.Tensor, codes: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest code of each value by its block's largest: places uint8 in one row, and scales, one a block."""
    flat = values.reshape(-1).float()
    missing = -flat.numel() % block
    blocks = torch.nn.functional.pad(flat, (0, missing)).view(-1, block)
    scales = blocks.abs().amax(1)
    # Times the reciprocal, not divided: the last bit decides on which side of a bound a value lies.
    scaled = (blocks * (1.0 / scales.clamp(min=_SMALLEST))[:, None]).clamp(-1, 1)
    bounds = (codes[:-1] + codes[1:]) / 2
    places = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8)
    return places.view(-1)[: flat.numel()], scales
