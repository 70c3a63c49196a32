"""bitsandbytes' NF4 without bitsandbytes: weights restored, and quantized, to the same bits.

Holds only for the versions that tests compared it with; for any other the library itself restores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

import torch

from gpu_service.domain.quantizer import LIBRARY, OWN, TESTED_VERSIONS
from gpu_service.engine.fast_path.operations import operations_for

BLOCK_WEIGHTS = 64
NESTED_BLOCK = 256


class NotNf4(ValueError):
    """A layer is quantized in another way than the fast path restores."""


# Asked for each layer of a model, and read from a file.
_read_version = cache(metadata.version)


def name_quantizer() -> str:
    """`own` beside a version of bitsandbytes that was compared, else `bitsandbytes`."""
    return OWN if _read_version("bitsandbytes") in TESTED_VERSIONS else LIBRARY


@dataclass(frozen=True, kw_only=True)
class Nf4Weight:
    """The parts of a quantized matrix [N, K], which stay the layer's own tensors; blocks of 64 weights.

    Without double quantization `scales` are float32 and the nested parts None.
    """

    packed: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    nested_codes: torch.Tensor | None
    nested_scales: torch.Tensor | None
    offset: torch.Tensor | None
    # The layer's weight, for the library's way.
    restore_by_library: Callable[[torch.Tensor], None] | None

    @classmethod
    def of(cls, layer: Any) -> Nf4Weight:
        """The parts of a bitsandbytes `Linear4bit`. Raises NotNf4."""
        state = layer.weight.quant_state
        columns = layer.in_features
        if state is None or state.quant_type != "nf4" or state.blocksize != BLOCK_WEIGHTS:
            raise NotNf4("the layer is not held in NF4 with blocks of 64")
        if columns % BLOCK_WEIGHTS:
            raise NotNf4(f"rows of {columns} weights are no whole number of blocks")
        if state.nested and state.state2.blocksize != NESTED_BLOCK:
            raise NotNf4("block scales are quantized in blocks of another length than 256")
        by_library = None if name_quantizer() == OWN else _library(layer.weight.data, state)
        return cls(
            packed=layer.weight.data,
            codes=state.code,
            scales=state.absmax,
            nested_codes=state.state2.code if state.nested else None,
            nested_scales=state.state2.absmax if state.nested else None,
            offset=state.offset if state.nested else None,
            restore_by_library=by_library,
        )

    def restore(self, out: torch.Tensor) -> None:
        """`out` [N, K], whose rows may lie apart, becomes the weights, rounded to its type."""
        if self.restore_by_library is not None:
            self.restore_by_library(out)
            return
        operations_for(out.device).nf4_dequantize(
            self.packed, self.codes, self.scales, self.nested_codes, self.nested_scales, self.offset, out
        )


def _library(packed: torch.Tensor, state: Any) -> Callable[[torch.Tensor], None]:
    from bitsandbytes.functional import dequantize_4bit

    def restore(out: torch.Tensor) -> None:
        out.copy_(dequantize_4bit(packed, state))

    return restore
