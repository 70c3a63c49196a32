"""A batch as the blocks take it: where its sequences begin, each token's place in the rotary tables, what is a target.

Makes the tables as it needs them. Knows no weight.
"""

from __future__ import annotations

from typing import Any

import numpy
import torch

from gpu_service.engine.fast_path.attention import Bounds
from gpu_service.engine.fast_path.block import Positions
from gpu_service.engine.fast_path.decoder import FlatPass
from gpu_service.engine.fast_path.frames import SHORTEST
from gpu_service.engine.training.batches import MicroBatch


class FlatPasses:
    """Of one model on one device."""

    def __init__(self, rotary: Any, device: torch.device) -> None:
        """`rotary` is transformers' module of rotary positions."""
        self._device = device
        self._frequencies = rotary.inv_freq.to(device, torch.float32)
        self._scaling = float(rotary.attention_scaling)
        self._cosines = self._sines = torch.empty(0, device=device)

    def lay_out(self, batch: MicroBatch) -> FlatPass:
        """`batch` is on the device; the host does not wait for what is sent there."""
        lengths = batch.layout.lengths
        targets = numpy.asarray(batch.targets_by_sequence, dtype=numpy.int64)
        starts = numpy.concatenate(([0], numpy.cumsum(lengths))).astype(numpy.int32)
        longest = max(lengths)
        self._extend_tables(longest)
        return FlatPass(
            tokens=batch.input_ids[0],
            positions=Positions(cosines=self._cosines, sines=self._sines, places=batch.position_ids[0]),
            bounds=Bounds(starts=self._send(starts), longest=longest, layout=batch.layout),
            targets=batch.target_positions,
            labels=batch.labels,
            sequences=self._send(numpy.repeat(numpy.arange(len(targets)), targets)),
            targets_by_sequence=self._send(targets),
        )

    def _send(self, values: Any) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        if self._device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _extend_tables(self, length: int) -> None:
        if length <= len(self._cosines):
            return
        # Seldom anew, and as long as what a recorded pass may be filled up with.
        length = 1 << (max(length, SHORTEST) - 1).bit_length()
        angles = torch.outer(torch.arange(length, device=self._device, dtype=torch.float32), self._frequencies)
        self._cosines = angles.cos() * self._scaling
        self._sines = angles.sin() * self._scaling


def sum_by_sequence(nats: torch.Tensor, flat: FlatPass) -> torch.Tensor:
    """Nats of targets [N] to those of sequences [S], float64."""
    # In an order that is always the same: adding by index is not, on a GPU.
    lengths = flat.targets_by_sequence
    return torch.segment_reduce(nats.double(), "sum", lengths=lengths, unsafe=True, initial=0.0)
