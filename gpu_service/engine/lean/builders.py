"""Stands where the catalog names builders of a family and a quantization: the same names, without their libraries."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from gpu_service.engine.lean.config import LeanConfig
from gpu_service.engine.lean.model import LeanCausal


@dataclass(frozen=True, kw_only=True)
class Builders:
    """What a `LoadRequest` has of them: modules of the catalog, or what stands for these here."""

    family: Any
    quantization: Any
    method: Any


FAMILY: Any = SimpleNamespace(MODEL_CLASS=LeanCausal, CONFIG_CLASS=LeanConfig)


def _count_nf4(model: torch.nn.Module) -> int:
    return sum(hasattr(parameter, "quant_state") for parameter in model.parameters())


QUANTIZATIONS: dict[str, Any] = {
    "nf4": SimpleNamespace(IS_QUANTIZED=True, count_quantized=_count_nf4),
    "none": SimpleNamespace(IS_QUANTIZED=False, count_quantized=lambda model: 0),
}
