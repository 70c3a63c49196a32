"""Weights to NF4 with double quantization, to the same bits as bitsandbytes, piece by piece on any device.

Blocks of 64 weights share a scale; 256 scales, less their mean, share one of their own. Holds for the versions that
`nf4.TESTED_VERSIONS` names. Plain torch here is the reference, and what a CPU runs; CUDA runs `quantizing_kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpu_service.engine.fast_path.nf4 import BLOCK_WEIGHTS, NESTED_BLOCK, NotNf4
from gpu_service.engine.fast_path.operations import first_launches

# Quantiles of a normal distribution, scaled to [-1, 1], with an exact 0 (Dettmers et al. 2023, arXiv:2305.14314).
NF4_CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_DECADES = 7
_SMALLEST = 1e-38
_GRID_HALF = 32767.5


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Two weights a byte [N * K / 2, 1], the first in the high half; scales as places in `nested_codes`, or float32."""

    packed: torch.Tensor
    scales: torch.Tensor
    nested_scales: torch.Tensor | None
    offset: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The codes on a device, and the bounds between them. Shared by all layers: nothing changes them."""

    codes: torch.Tensor
    bounds: torch.Tensor
    nested_codes: torch.Tensor
    nested_bounds: torch.Tensor

    @classmethod
    def on(cls, device: torch.device) -> Tables:
        codes, nested = torch.tensor(NF4_CODES, device=device), nested_codes(device)
        nested_bounds = (nested[:-1] + nested[1:]) / 2
        if device.type == "cuda":
            # What lies on a bound is below it, here. The library's kernels search by halving and end at an even place,
            # from which a value goes down only if it is nearer: on every other bound it is above.
            below = torch.tensor(-torch.inf, device=device)
            nested_bounds[1::2] = torch.nextafter(nested_bounds[1::2], below)
        return cls(codes=codes, bounds=(codes[:-1] + codes[1:]) / 2, nested_codes=nested, nested_bounds=nested_bounds)


def quantize(weight: torch.Tensor, *, double: bool) -> Quantized:
    """`weight` [N, K] with K a multiple of 64; of 16 bits on CUDA. Raises NotNf4 for any other."""
    if weight.ndim != 2 or weight.shape[1] % BLOCK_WEIGHTS:
        raise NotNf4(f"a weight of shape {tuple(weight.shape)} is no whole number of blocks a row")
    tables = Tables.on(weight.device)
    packed = torch.empty(weight.numel() // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(weight.numel() // BLOCK_WEIGHTS, device=weight.device)
    quantize_values(weight.reshape(-1), tables, packed, scales)
    if not double:
        return Quantized(packed=packed[:, None], scales=scales, nested_scales=None, offset=None)
    places = torch.empty(len(scales), dtype=torch.uint8, device=weight.device)
    nested = torch.empty(-(-len(scales) // NESTED_BLOCK), device=weight.device)
    offset = torch.empty((), device=weight.device)
    quantize_scales(scales, tables, places, nested, offset)
    return Quantized(packed=packed[:, None], scales=places, nested_scales=nested, offset=offset)


def make_ready(tables: Tables, dtype: torch.dtype) -> None:
    """Compile what quantizes weights of `dtype` on the tables' device, before several threads ask for it at once."""
    device = tables.codes.device
    if device.type == "cuda":
        num_weights = BLOCK_WEIGHTS * NESTED_BLOCK
        scales = torch.empty(NESTED_BLOCK, device=device)
        places = torch.empty(NESTED_BLOCK, dtype=torch.uint8, device=device)
        packed = torch.empty(num_weights // 2, dtype=torch.uint8, device=device)
        with first_launches:
            quantize_values(torch.zeros(num_weights, dtype=dtype, device=device), tables, packed, scales)
            quantize_scales(scales, tables, places, torch.empty(1, device=device), torch.empty((), device=device))


def quantize_values(values: torch.Tensor, tables: Tables, packed: torch.Tensor, scales: torch.Tensor) -> None:
    """Whole blocks of weights, `values` [n]: `packed` uint8 [n / 2] and `scales` float32 [n / 64] are written.

    Raises NotNf4 for float32 on CUDA: not every code of such weights was the library's.
    """
    if values.device.type == "cuda":
        if values.dtype is torch.float32:
            raise NotNf4("weights in float32 are quantized by the library alone")
        from gpu_service.engine.fast_path import quantizing_kernels

        quantizing_kernels.quantize_values(values, tables.bounds, packed, scales)
    else:
        quantize_values_reference(values, tables.bounds, packed, scales)


def quantize_scales(
    scales: torch.Tensor, tables: Tables, places: torch.Tensor, nested: torch.Tensor, offset: torch.Tensor
) -> None:
    """All scales of a matrix, float32 [m]: `places` uint8 [m] in `nested_codes`, `nested` float32 [m / 256, rounded up]
    and `offset` float32 [] are written.
    """
    offset.copy_(scales.mean())
    if scales.device.type == "cuda":
        from gpu_service.engine.fast_path import quantizing_kernels

        quantizing_kernels.quantize_scales(scales, offset, tables.nested_bounds, places, nested)
    else:
        quantize_scales_reference(scales, offset, tables.nested_bounds, places, nested)


def quantize_values_reference(
    values: torch.Tensor, bounds: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor
) -> None:
    """What the kernel of the same name computes."""
    places, found = _quantize_blocks(values, bounds, BLOCK_WEIGHTS)
    if values.device.type == "cuda":
        # The library's kernels have the first code in a block of zeros, where its CPU code has that of 0.
        places = places.view(-1, BLOCK_WEIGHTS).masked_fill(found[:, None] == 0, 0).view(-1)
    packed.copy_(places[::2] << 4 | places[1::2])
    scales.copy_(found)


def quantize_scales_reference(
    scales: torch.Tensor, offset: torch.Tensor, bounds: torch.Tensor, places: torch.Tensor, nested: torch.Tensor
) -> None:
    """What the kernel of the same name computes; on a CPU, what the library's CPU code does, which is less exact."""
    on_cpu = scales.device.type == "cpu"
    found_places, found = _quantize_blocks(scales - offset, bounds, NESTED_BLOCK, on_grid=on_cpu)
    if not on_cpu:
        # As in a block of weights that are all zeros.
        empty = (found == 0).repeat_interleave(NESTED_BLOCK)[: len(found_places)]
        found_places = found_places.masked_fill(empty, 0)
    places.copy_(found_places)
    nested.copy_(found)


def nested_codes(device: torch.device) -> torch.Tensor:
    """256 signed values: in each of seven decades twice as many as in the one below, evenly spread, 0 and 1."""
    values: list[float] = [0.0, 1.0]
    for decade in range(_DECADES):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        scaled = (10.0 ** (decade - _DECADES + 1) * middles).tolist()
        values += [*scaled, *(-value for value in scaled)]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def _quantize_blocks(
    values: torch.Tensor, bounds: torch.Tensor, block: int, *, on_grid: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest code of each value by its block's largest: places uint8 in one row, and scales, one a block.

    `on_grid`: values are rounded to a grid of 65,536 first; the library's CPU code looks their codes up by that.
    """
    flat = values.reshape(-1).float()
    missing = -flat.numel() % block
    blocks = torch.nn.functional.pad(flat, (0, missing)).view(-1, block)
    scales = blocks.abs().amax(1)
    # Times the reciprocal, not divided: the last bit decides on which side of a bound a value lies. It is exact, as the
    # CPU's is; kernels have the device's approximation, by which one value in millions has the next code.
    scaled = (blocks * (1.0 / scales.clamp(min=_SMALLEST))[:, None]).clamp(-1, 1)
    if on_grid:
        scaled = torch.floor((scaled + 1) * _GRID_HALF + 0.5) / _GRID_HALF - 1
    places = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8)
    return places.view(-1)[: flat.numel()], scales
