"""What a node learned from measured runs and probes about its own estimates. Pure: keeps no file.

For each kind of run there are a few cells: what arithmetic predicted, and what the peak came to. Arithmetic says the
same for the same run, so its number names the cell.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

ANALYTIC = "analytic"
CALIBRATED = "calibrated"
# Of what measurements mean: rises when arithmetic says another number for the same run, or a kind of run is told by
# something else. What was measured under another is worth nothing.
VERSION = 4
# Cells kept for a kind of run, and kinds kept; the oldest go first.
MAX_CELLS = 32
MAX_KINDS = 64
# A cell says nothing about runs that are larger or smaller than it by more than this.
_REACH = 4.0
# What a measurement may change; one beyond it comes from something else on the device.
_MIN_RATIO, _MAX_RATIO = 0.5, 2.0


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measured peaks of one kind of run by what arithmetic had predicted, both in bytes, oldest first."""

    cells: Mapping[int, int] = field(default_factory=dict)

    @property
    def basis(self) -> str:
        return CALIBRATED

    def scale(self, analytic_bytes: int) -> int | None:
        """The peak to expect where arithmetic says `analytic_bytes`; None when nothing like it was measured.

        The nearest cell's ratio, and never less than what was measured of this very cell.
        """
        if analytic_bytes <= 0 or not self.cells:
            return None
        nearest = min(self.cells, key=lambda predicted: abs(math.log(predicted / analytic_bytes)))
        if not 1 / _REACH <= nearest / analytic_bytes <= _REACH:
            return None
        ratio = min(max(self.cells[nearest] / nearest, _MIN_RATIO), _MAX_RATIO)
        return max(round(analytic_bytes * ratio), self.cells.get(analytic_bytes, 0))

    def with_cell(self, analytic_bytes: int, peak_bytes: int) -> "Calibration":
        """The same with one more measurement; of a cell that was measured before, the highest peak stays."""
        if analytic_bytes <= 0 or peak_bytes <= 0:
            return self
        highest = max(peak_bytes, self.cells.get(analytic_bytes, 0))
        others = [(predicted, peak) for predicted, peak in self.cells.items() if predicted != analytic_bytes]
        return replace(self, cells=dict([*others, (analytic_bytes, highest)][-MAX_CELLS:]))

    def to_json(self) -> list[list[int]]:
        """Pairs of what was predicted and what was measured, oldest first."""
        return [[predicted, peak] for predicted, peak in self.cells.items()]

    @classmethod
    def from_json(cls, value: Any) -> "Calibration":
        """Raises ValueError, TypeError for what `to_json` did not write."""
        cells = {int(predicted): int(peak) for predicted, peak in value}
        if any(predicted <= 0 or peak <= 0 for predicted, peak in cells.items()):
            raise ValueError("a measurement is of no bytes")
        return cls(cells=dict(list(cells.items())[-MAX_CELLS:]))


UNCALIBRATED = Calibration()


def kind_of_run(
    *,
    training_type: str,
    quantization: str,
    compute_dtype: str,
    model_type: str,
    optimizer: str,
    recomputation: str,
    objective: str,
    trainer: str,
    compute: str,
    base_weights: str,
    device_name: str,
) -> str:
    """The key under which measurements of like runs are kept.

    `recomputation` and `base_weights` are as they were asked for: what a plan chooses itself changes with its data.
    """
    parts = (
        training_type, quantization, compute_dtype, model_type, optimizer, recomputation, objective, trainer, compute,
        base_weights, device_name,
    )  # fmt: skip
    return "/".join(part.replace("/", "-") for part in parts)
