"""Frozen layers that are multiplied in 8 bits: weights, rows and gradients as e4m3 with a scale a row, sums in float32.

Other numerics than the compute type's, for those who ask for them. Weights are rounded twice, once for each direction,
from what they are restored to, and kept. The adapter's part is in the same product, in further columns that hold about
as many bits as the compute type has (`fp8_reference`). Takes the place of `FrozenGroup` for a projection; the outermost
blocks keep theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gpu_service.engine.fast_path.adapters import AdapterGroup
from gpu_service.engine.fast_path.fp8_reference import RoundedCopy, padded
from gpu_service.engine.fast_path.frozen import Margins, join_biases
from gpu_service.engine.fast_path.nf4 import Nf4Weight
from gpu_service.engine.fast_path.operations import operations_for

# Where a model has as many blocks, its first and last are worth leaving as they are.
_ENOUGH_BLOCKS = 8

# Rows in 8 bits, and their scales.
Rounded = tuple[torch.Tensor, torch.Tensor]


def blocks_in_8_bits(num_blocks: int) -> range:
    """The blocks whose products are rounded: all but the first two and the last of a model that has enough of them.

    What those lose is much of what all lose together, and they are a small part of the work.
    """
    return range(2, num_blocks - 1) if num_blocks >= _ENOUGH_BLOCKS else range(num_blocks)


class RoundedGroup:
    """Linear layers (NF4, with `weight` and `bias`) that read the same rows, and the adapter beside them.

    Of margins, [T, room], only the adapter's ranks are read and written. What a product reads of the adapter in 8 bits
    is what `round_out` last wrote; of an adapter too large for that it makes NaN.
    """

    def __init__(self, layers: Sequence[Any], adapter: AdapterGroup, *, dtype: torch.dtype) -> None:
        """Raises NotNf4."""
        device = layers[0].weight.device
        self._operations = operations_for(device)
        self._adapter = adapter
        self.out_features = tuple(layer.out_features for layer in layers)
        self.in_features: int = layers[0].in_features
        self.num_rows = sum(self.out_features)
        self.bias = join_biases(layers, dtype)
        # Goes again: only here are weights restored.
        matrix, first = torch.empty(self.num_rows, self.in_features, device=device, dtype=dtype), 0
        for layer in layers:
            Nf4Weight.of(layer).restore(matrix[first : first + layer.out_features])
            first += layer.out_features
        # [N, ... + K] with a scale for each of N; [K, ... + N] with one for each of K.
        self._columns = padded(self.in_features, adapter.num_ranks)
        self._columns_back = padded(self.num_rows, adapter.num_ranks)
        self._forward = self._operations.round_weights(matrix, self._columns)
        self._backward = self._operations.round_weights(matrix.t().contiguous(), self._columns_back)
        self.margins = Margins(
            right=torch.zeros(self.num_rows, adapter.room, device=device, dtype=dtype),
            below=torch.zeros(adapter.room, self.in_features, device=device, dtype=dtype),
        )
        # What `bound_ranks` last wrote of `ranked`.
        self.bound = torch.zeros((), device=device)

    @property
    def ranked(self) -> torch.Tensor:
        """What ranks are made with, [R, K]: a view of the margin."""
        return self.margins.below[: self._adapter.num_ranks]

    def copies(self) -> list[RoundedCopy]:
        """What `round_out` writes: B before the weights of the forward direction, A before the others'."""
        adapter, found = self._adapter, []
        for part in adapter.parts:
            rows = slice(part.first_row, part.first_row + part.num_rows)
            values, scales = self._forward
            found.append(
                RoundedCopy(
                    start=part.start_b,
                    rows=part.num_rows,
                    rank=adapter.rank,
                    row_step=adapter.rank,
                    rank_step=1,
                    factor=adapter.scaling,
                    values=values[rows, part.first_rank :],
                    scales=scales[rows],
                    step=adapter.num_ranks,
                    small_ranks=False,
                )
            )
            values, scales = self._backward
            found.append(
                RoundedCopy(
                    start=part.start_a,
                    rows=self.in_features,
                    rank=adapter.rank,
                    row_step=1,
                    rank_step=self.in_features,
                    factor=1.0,
                    values=values[:, part.first_rank :],
                    scales=scales,
                    step=adapter.num_ranks,
                    small_ranks=True,
                )
            )
        return found

    def fill_ranks(self, rows: torch.Tensor, margin: torch.Tensor) -> None:
        """The ranks' part of `margin` becomes x A', `rows` [T, K] being x."""
        self._operations.rank_rows(rows, self.ranked, margin[:, : self._adapter.num_ranks])

    def round(self, rows: torch.Tensor, margin: torch.Tensor | None) -> Rounded:
        """`rows` [T, K] for `multiply`, with the ranks of `margin`; None: without the adapter."""
        rounded: Rounded = self._operations.round_rows(rows, self._ranks(margin), self._columns, small_ranks=False)
        return rounded

    def fill_and_round(self, rows: torch.Tensor, margin: torch.Tensor) -> Rounded:
        """`fill_ranks` and `round` in one; to the same bits."""
        rounded: Rounded = self._operations.rank_and_round(
            rows, self.ranked, margin[:, : self._adapter.num_ranks], self._columns, small_ranks=False
        )
        return rounded

    def gate_and_round(self, gate_up: torch.Tensor, rows: torch.Tensor, margin: torch.Tensor) -> Rounded:
        """`rows` [T, K] become silu(gate) * up of `gate_up` [T, 2 * K]; the rest as `fill_and_round`.

        They are rounded while they are made, and so before their ranks are known: scales leave room for any.
        """
        rounded: Rounded = self._operations.gate_and_round(gate_up, rows, self.bound, self._columns)
        self._operations.rank_beside(rows, self.ranked, margin[:, : self._adapter.num_ranks], *rounded)
        return rounded

    def multiply(self, rounded: Rounded, out: torch.Tensor) -> None:
        """`out` [T, N] becomes the layers' outputs."""
        self._operations.multiply_rounded(*rounded, *self._forward, out)
        if self.bias is not None:
            out += self.bias

    def round_back(self, gradient: torch.Tensor, margin: torch.Tensor | None) -> Rounded:
        """`gradient` [T, N] for `multiply_back`, with the ranks' in `margin`; None: without the adapter."""
        rounded: Rounded = self._operations.round_rows(
            gradient, self._ranks(margin), self._columns_back, small_ranks=True
        )
        return rounded

    def fill_and_round_back(self, gradient: torch.Tensor, margin: torch.Tensor) -> Rounded:
        """The ranks' part of `margin` becomes `gradient` times B; and `round_back`; with one read of `gradient`."""
        used = self._adapter.num_ranks
        rounded: Rounded = self._operations.rank_and_round(
            gradient, self.margins.right[:, :used].t(), margin[:, :used], self._columns_back, small_ranks=True
        )
        return rounded

    def multiply_back(self, rounded: Rounded, out: torch.Tensor) -> None:
        """`out` [T, K] becomes the rows' gradient."""
        self._operations.multiply_rounded(*rounded, *self._backward, out)

    def _ranks(self, margin: torch.Tensor | None) -> torch.Tensor | None:
        used = self._adapter.num_ranks
        return None if margin is None or not used else margin[:, :used]
