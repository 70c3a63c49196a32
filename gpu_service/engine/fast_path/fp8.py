"""Frozen layers that are multiplied in 8 bits: weights, rows and gradients as e4m3 with a scale a row, sums in float32.

Other numerics than the compute type's, for those who ask for them. Weights are rounded twice, once for each direction,
from what they are restored to, and kept; the adapter's part is made in the compute type and added before the one
rounding of the sum. Takes the place of `FrozenGroup` for a projection; the outermost blocks keep theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gpu_service.engine.fast_path.frozen import Margins, Scratch, join_biases
from gpu_service.engine.fast_path.nf4 import Nf4Weight
from gpu_service.engine.fast_path.operations import operations_for

# Where a model has as many blocks, its first and last are worth leaving as they are.
_ENOUGH_BLOCKS = 8


def blocks_in_8_bits(num_blocks: int) -> range:
    """The blocks whose products are rounded: all but the first and the last of a model that has enough of them.

    What those two lose is much of what all lose together, and they are a small part of the work.
    """
    return range(1, num_blocks - 1) if num_blocks >= _ENOUGH_BLOCKS else range(num_blocks)


class RoundedGroup:
    """Linear layers (NF4, with `weight` and `bias`) that read the same rows. `room` is the width of their margins."""

    def __init__(self, layers: Sequence[Any], *, room: int, scratch: Scratch, dtype: torch.dtype) -> None:
        """Weights pass through `scratch`, whose views are not valid afterwards. Raises NotNf4."""
        device = layers[0].weight.device
        self._operations = operations_for(device)
        self.out_features = tuple(layer.out_features for layer in layers)
        self.in_features: int = layers[0].in_features
        self.num_rows = sum(self.out_features)
        self.bias = join_biases(layers, dtype)
        matrix, first = scratch.view(self.num_rows, self.in_features), 0
        for layer in layers:
            Nf4Weight.of(layer).restore(matrix[first : first + layer.out_features])
            first += layer.out_features
        # [N, K] with a scale for each of N; [K, N] with one for each of K.
        self._forward = self._operations.round_rows(matrix)
        self._backward = self._operations.round_rows(matrix.t().contiguous())
        self.margins = Margins(
            right=torch.zeros(self.num_rows, room, device=device, dtype=dtype),
            below=torch.zeros(room, self.in_features, device=device, dtype=dtype),
        )

    def multiply(self, x: torch.Tensor, out: torch.Tensor, *, adapted: bool) -> None:
        """`out` [T, N] becomes the layers' outputs; `x` is [T, K + room], its margin x A' if `adapted`."""
        rows, ranks = x[:, : self.in_features], x[:, self.in_features :]
        product = self._multiply(rows, self._forward, out.dtype)
        if self.bias is not None:
            product += self.bias
        self._operations.add_ranks(product, ranks, self.margins.right.t() if adapted else None, out)

    def multiply_back(self, gradient: torch.Tensor, out: torch.Tensor, *, adapted: bool) -> None:
        """`out` [T, K] becomes the rows' gradient; `gradient` is [T, N + room], its margin the ranks' if `adapted`."""
        of_output, inner = gradient[:, : self.num_rows], gradient[:, self.num_rows :]
        product = self._multiply(of_output, self._backward, out.dtype)
        self._operations.add_ranks(product, inner, self.margins.below if adapted else None, out)

    def _multiply(
        self, rows: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        values, scales = self._operations.round_rows(rows)
        product: torch.Tensor = self._operations.multiply_rounded(values, scales, *weights, dtype)
        return product
