"""All quantized matrices of a model in one buffer, in an order that follows from their names alone.

So one buffer is written to a file and read back as it is. The parts of a matrix are views of it, which the layers hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from gpu_service.engine.fast_path.nf4 import BLOCK_WEIGHTS, NESTED_BLOCK
from gpu_service.engine.fast_path.quantizing import Tables, quantize_scales, quantize_values
from gpu_service.engine.reading.lanes import Lane
from gpu_service.engine.reading.reader import PIECE_BYTES, Piece

_ALIGNMENT_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class Parts:
    """One matrix: `packed` uint8 [N * K / 2, 1]; `scales` uint8 with nested parts, or float32 without."""

    packed: torch.Tensor
    scales: torch.Tensor
    nested_scales: torch.Tensor | None
    offset: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where every part of every matrix lies, in bytes from the start."""

    shapes: Mapping[str, tuple[int, ...]]
    double: bool
    starts: Mapping[tuple[str, str], int]
    num_bytes: int

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], *, double: bool) -> Layout:
        """Small parts first: they are read in a few pieces together."""
        starts: dict[tuple[str, str], int] = {}
        end = 0
        for part in ("offset", "nested_scales", "scales", "packed"):
            for name in sorted(shapes):
                num_bytes = _part_bytes(prod(shapes[name]), double=double)[part]
                if num_bytes:
                    starts[name, part] = end
                    end += -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return cls(shapes=shapes, double=double, starts=starts, num_bytes=end)

    def parts(self, name: str, buffer: torch.Tensor) -> Parts:
        """The views of one matrix in `buffer`, uint8 [num_bytes]."""
        sizes = _part_bytes(prod(self.shapes[name]), double=self.double)

        def view(part: str, dtype: torch.dtype) -> torch.Tensor:
            start = self.starts[name, part]
            return buffer[start : start + sizes[part]].view(dtype)

        return Parts(
            packed=view("packed", torch.uint8)[:, None],
            scales=view("scales", torch.uint8 if self.double else torch.float32),
            nested_scales=view("nested_scales", torch.float32) if self.double else None,
            offset=view("offset", torch.float32)[0] if self.double else None,
        )


def _part_bytes(num_weights: int, *, double: bool) -> dict[str, int]:
    num_blocks = num_weights // BLOCK_WEIGHTS
    return {
        "offset": 4 if double else 0,
        "nested_scales": 4 * -(-num_blocks // NESTED_BLOCK) if double else 0,
        "scales": num_blocks * (1 if double else 4),
        "packed": num_weights // 2,
    }


@dataclass(frozen=True, kw_only=True)
class QuantizingTask:
    """One matrix from its pieces to its parts. `dtype` is the stored type, `rounded` the one it is quantized from."""

    pieces: Sequence[Piece]
    dtype: torch.dtype
    rounded: torch.dtype
    parts: Parts
    tables: Tables
    num_weights: int
    scratch_floats: int = field(init=False)

    def __post_init__(self) -> None:
        nested = self.parts.nested_scales is not None
        object.__setattr__(self, "scratch_floats", self.num_weights // BLOCK_WEIGHTS if nested else 0)

    def take(self, number: int, host: torch.Tensor, lane: Lane) -> None:
        """Quantize a piece's blocks; their scales wait for those of the whole matrix."""
        first = number * PIECE_BYTES // self.dtype.itemsize
        end = first + self.pieces[number].num_bytes // self.dtype.itemsize
        values = lane.move(host, self.dtype).to(self.rounded)
        blocks = slice(first // BLOCK_WEIGHTS, end // BLOCK_WEIGHTS)
        quantize_values(values, self.tables, self.parts.packed[first // 2 : end // 2, 0], self._scales(lane)[blocks])

    def finish(self, lane: Lane) -> None:
        """Quantize the scales."""
        if self.parts.nested_scales is not None:
            assert self.parts.offset is not None
            quantize_scales(
                self._scales(lane), self.tables, self.parts.scales, self.parts.nested_scales, self.parts.offset
            )

    def _scales(self, lane: Lane) -> torch.Tensor:
        return lane.scratch(self.scratch_floats) if self.scratch_floats else self.parts.scales
