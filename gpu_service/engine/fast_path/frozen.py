"""The frozen weights of a block as the fast path multiplies by them: layers that read the same rows become one matrix.

The matrix is wider and higher than the weights by `room`, for the adapter: [[W, B], [A, 0]]. So one product forward
gives x W' + t B', and one backward gives dy W + dt A, each summed in the accumulator and rounded once. What is in the
margins is the adapter's business. Weights are quantized (`nf4`, restored at each use into a buffer that all groups
share, or once and kept) or plain, then the modules' own parameters become views of the matrix, and cost nothing twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from gpu_service.engine.fast_path.nf4 import Nf4Weight


@dataclass(frozen=True, kw_only=True)
class Margins:
    """What an adapter puts beside the weights. `right` is [N, room], `below` [room, K]; both in the compute type."""

    right: torch.Tensor
    below: torch.Tensor


class Scratch:
    """One buffer, as large as the largest matrix that was restored into it; the next one overwrites it."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._buffer = torch.empty(0, device=device, dtype=dtype)

    def view(self, rows: int, columns: int) -> torch.Tensor:
        """Room for a matrix; earlier views are not valid any more."""
        if rows * columns > self._buffer.numel():
            # Never both.
            self._buffer = self._buffer.new_empty(0)
            self._buffer = self._buffer.new_empty(rows * columns)
        return self._buffer[: rows * columns].view(rows, columns)

    def drop(self) -> None:
        """Let go of the buffer: what is restored from now on may be smaller."""
        self._buffer = self._buffer.new_empty(0)


class FrozenGroup:
    """Linear layers (modules with `weight` and `bias`) that read the same rows. `room` columns and rows of margin."""

    def __init__(self, layers: Sequence[Any], *, room: int, scratch: Scratch, dtype: torch.dtype, keep: bool) -> None:
        """`keep`: restore quantized weights once, now, and keep the matrix; plain ones always are."""
        self._room = room
        self._scratch = scratch
        self._device, self._dtype = layers[0].weight.device, dtype
        self.out_features = tuple(layer.out_features for layer in layers)
        self.in_features: int = layers[0].in_features
        self.num_rows = sum(self.out_features)
        self.bias = join_biases(layers, dtype)
        self._quantized = [Nf4Weight.of(layer) for layer in layers if hasattr(layer.weight, "quant_state")]
        self._matrix: torch.Tensor | None = None
        if not self._quantized:
            self._matrix = self._adopt(layers, dtype)
        elif keep:
            self._matrix = torch.zeros(self._shape, device=self._device, dtype=dtype)
            self._restore(self._matrix)
        # The matrix that stands inside `restored`.
        self._held: torch.Tensor | None = None
        self.margins = self._make_margins()

    @property
    def is_restored(self) -> bool:
        """Whether quantized weights stand in the compute type besides."""
        return bool(self._quantized) and self._matrix is not None

    def drop_restored(self) -> None:
        """Let go of weights that were restored once, with the margins; nothing works before `stream`."""
        self._matrix = None
        del self.margins

    def stream(self) -> None:
        """From now on weights are restored at each use. Margins are new, and hold zeros."""
        self.margins = self._make_margins()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, weights that are restored at each use are restored once, in memory of their own; with the margins as
        they are at the beginning.
        """
        if self._matrix is not None:
            yield
            return
        held = torch.empty(self._shape, device=self._device, dtype=self._dtype)
        self._restore(held)
        held[: self.num_rows, self.in_features :].copy_(self.margins.right)
        held[self.num_rows :, : self.in_features].copy_(self.margins.below)
        self._held = held
        del held
        try:
            yield
        finally:
            self._held = None

    @property
    def _shape(self) -> tuple[int, int]:
        return self.num_rows + self._room, self.in_features + self._room

    def _make_margins(self) -> Margins:
        """Those of the matrix itself where it is kept, else buffers that are copied beside what is restored."""
        if self._matrix is not None:
            return Margins(
                right=self._matrix[: self.num_rows, self.in_features :],
                below=self._matrix[self.num_rows :, : self.in_features],
            )
        return Margins(
            right=torch.zeros(self.num_rows, self._room, device=self._device, dtype=self._dtype),
            below=torch.zeros(self._room, self.in_features, device=self._device, dtype=self._dtype),
        )

    def forward_matrix(self, *, adapted: bool) -> torch.Tensor:
        """[N, K + room], or [N, K] without the adapter. Valid until another group's matrix is asked for."""
        matrix = self._get()[: self.num_rows]
        if not adapted:
            return matrix[:, : self.in_features]
        if self._matrix is None and self._held is None:
            matrix[:, self.in_features :].copy_(self.margins.right)
        return matrix

    def backward_matrix(self, *, adapted: bool) -> torch.Tensor:
        """[N + room, K], or [N, K] without the adapter. Valid until another group's matrix is asked for."""
        matrix = self._get()[:, : self.in_features]
        if not adapted:
            return matrix[: self.num_rows]
        if self._matrix is None and self._held is None:
            matrix[self.num_rows :].copy_(self.margins.below)
        return matrix

    def multiply(self, x: torch.Tensor, out: torch.Tensor, *, adapted: bool) -> None:
        """`out` [T, N] becomes the layers' outputs; `x` is [T, K + room], its margin x A' if `adapted`."""
        matrix = self.forward_matrix(adapted=adapted).t()
        rows = x if adapted else x[:, : self.in_features]
        if self.bias is None:
            torch.mm(rows, matrix, out=out)
        else:
            torch.addmm(self.bias, rows, matrix, out=out)

    def multiply_back(self, gradient: torch.Tensor, out: torch.Tensor, *, adapted: bool) -> None:
        """`out` [T, K] becomes the rows' gradient; `gradient` is [T, N + room], its margin the ranks' if `adapted`."""
        of_output = gradient if adapted else gradient[:, : self.num_rows]
        torch.mm(of_output, self.backward_matrix(adapted=adapted), out=out)

    def _get(self) -> torch.Tensor:
        if self._matrix is not None:
            return self._matrix
        if self._held is not None:
            return self._held
        matrix = self._scratch.view(*self._shape)
        self._restore(matrix)
        return matrix

    def _restore(self, matrix: torch.Tensor) -> None:
        first = 0
        for weight, rows in zip(self._quantized, self.out_features, strict=True):
            weight.restore(matrix[first : first + rows, : self.in_features])
            first += rows

    def _adopt(self, layers: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
        matrix = torch.zeros(self._shape, device=layers[0].weight.device, dtype=dtype)
        first = 0
        for layer, rows in zip(layers, self.out_features, strict=True):
            place = matrix[first : first + rows, : self.in_features]
            place.copy_(layer.weight.data)
            layer.weight.data = place
            first += rows
        return matrix


def join_biases(layers: Sequence[Any], dtype: torch.dtype) -> torch.Tensor | None:
    """One vector [N] for all layers, with zeros for those that have none; None where none of them has one."""
    if all(layer.bias is None for layer in layers):
        return None
    parts = [
        layer.weight.new_zeros(layer.out_features, dtype=dtype) if layer.bias is None else layer.bias.data.to(dtype)
        for layer in layers
    ]
    return torch.cat(parts)
