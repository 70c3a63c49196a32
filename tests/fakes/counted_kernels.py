"""Kernels that allocate what the fast path's do and compute nothing, on a meta device, for tests that count memory.

What FlashAttention's kernels take inside stands here as it was read from them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from gpu_service.engine.fast_path import torch_reference
from gpu_service.engine.fast_path.attention import Bounds
from gpu_service.engine.fast_path.block import Positions
from gpu_service.engine.fast_path.decoder import FlatPass
from gpu_service.engine.training.flat_attention import FlatLayout
from tests.fakes.live_bytes import LiveBytes

META = torch.device("meta")


class Kernels:
    """Allocates what kernels do: what their references give back, and nothing on the way."""

    def __init__(self, live: LiveBytes) -> None:
        self._live = live

    def __getattr__(self, name: str) -> Any:
        reference = getattr(torch_reference, name)
        return lambda *arguments, **options: self._live.see(reference(*arguments, **options))

    def prepare_ranks(self, parts: Any, **options: Any) -> Any:
        prepared = torch_reference.prepare_ranks(parts, **options)
        return replace(prepared, takes_gates=len(parts) > 1 and prepared.rank <= 32)

    def adapter_backward(self, gradient: Any, *rest: Any) -> None:
        """Tables of partial sums for layers side by side: of every slab of columns, by rows and by runs of rows."""
        prepared = rest[3]
        if len(prepared.parts) > 1 and prepared.rank <= 32:
            self._allocate_tables(len(gradient), gradient.shape[1], prepared, slab={16: 256, 32: 128}, run=128)

    def gate_adapter_backward_(self, gradient: Any, gate_up: Any, *rest: Any) -> None:
        self._allocate_tables(len(gradient), gradient.shape[1], rest[3], slab={16: 128, 32: 128}, run=32)

    def _allocate_tables(self, rows: int, width: int, prepared: Any, *, slab: dict[int, int], run: int) -> None:
        rank = max(16, 1 << (prepared.rank - 1).bit_length())
        columns = slab[rank]
        slabs = sum(-(-part.num_rows // columns) for part in prepared.parts)
        splits = max(1, min(528 // -(-width // columns), -(-rows // run)))
        tables = torch.empty(slabs, rows, rank, device=META), torch.empty(splits, slabs, columns, rank, device=META)
        del tables


class Flash:
    """Allocates what FlashAttention-2's kernels do."""

    lengths_may_vary = True

    def forward(self, query: Any, key: Any, value: Any, bounds: Bounds) -> tuple[torch.Tensor, Any]:
        tokens, heads, _ = query.shape
        return torch.empty(query.shape, device=META, dtype=query.dtype), torch.empty(heads, tokens, device=META)

    def backward(
        self, gradient: Any, query: Any, key: Any, value: Any, output: Any, kept: Any, bounds: Bounds
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens, heads, width = query.shape
        rows = tokens + 128 * len(bounds.layout.lengths)
        of_query, of_key, of_value = (
            torch.empty(part.shape, device=META, dtype=part.dtype) for part in (query, key, value)
        )
        inside = [torch.empty(rows, heads, width, device=META), torch.empty(heads, rows, device=META)]
        if key.shape[1] != heads:
            inside += [torch.empty(query.shape, device=META, dtype=query.dtype) for _ in range(2)]
        del inside
        return of_query, of_key, of_value


def lay_out(lengths: tuple[int, ...], targets: int, head_dim: int) -> FlatPass:
    """A pass of so many tokens and targets, which are nobody's."""
    tokens = sum(lengths)

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(*shape, device=META, dtype=dtype)

    half = head_dim // 2
    longest = 1 << (max(lengths) - 1).bit_length()
    return FlatPass(
        tokens=empty(tokens),
        positions=Positions(
            cosines=empty(longest, half, dtype=torch.float32),
            sines=empty(longest, half, dtype=torch.float32),
            places=empty(tokens),
        ),
        bounds=Bounds(
            starts=empty(len(lengths) + 1, dtype=torch.int32), longest=max(lengths), layout=FlatLayout(lengths=lengths)
        ),
        targets=empty(targets),
        labels=empty(targets),
        sequences=empty(targets),
        targets_by_sequence=empty(len(lengths)),
    )
