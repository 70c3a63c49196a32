"""What an export is made from: the base's files and the adapter's layers, as plain matrices. Writes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from gpu_service.catalog import families
from gpu_service.engine.loading import Loaded
from gpu_service.engine.request import RunRequest
from tunesmith.common.v1 import plan_pb2

_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class AdapterLayer:
    """One covered linear layer: `path` in the base, and the two matrices whose scaled product is added to it."""

    path: str
    # [rank, in_features] and [out_features, rank], float32, on the run's device.
    down: torch.Tensor
    up: torch.Tensor
    scaling: float

    def difference(self) -> torch.Tensor:
        """What the adapter adds to the layer's weight: [out_features, in_features], float32."""
        return (self.up @ self.down) * self.scaling

    def apply(self, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """The layer's outputs with the adapter's added, unmerged."""
        added = (inputs.float() @ self.down.T @ self.up.T) * self.scaling
        return outputs + added.to(outputs.dtype)


@dataclass(frozen=True, kw_only=True)
class ExportSource:
    """`model` is the PEFT model as the run had it; `layers` are its adapter's."""

    model_directory: Path
    family: ModuleType
    model: Any
    layers: tuple[AdapterLayer, ...]
    tokenizer: Any
    # The type that most of the base's weights have in the files.
    stored_dtype: torch.dtype | None
    device: torch.device
    # What the base's class puts before the decoder's names, e.g. `model`.
    base_prefix: str


def open_source(*, request: RunRequest, plan: plan_pb2.Plan, model: Any, loaded: Loaded) -> ExportSource | None:
    """Take the adapter's layers out of a PEFT model with one LoRA adapter, without changing it.

    None when the plan wants no export.
    """
    if not plan.resolved.exports:
        return None
    family = import_module(families.REGISTRY[plan.model_type].builder)
    layers: list[AdapterLayer] = []
    with torch.no_grad():
        for name, module in model.named_modules():
            if not isinstance(module, LoraLayer):
                continue
            (adapter,) = module.active_adapters
            layers.append(
                AdapterLayer(
                    path=name.removeprefix(_PEFT_PREFIX),
                    down=module.lora_A[adapter].weight.detach().float(),
                    up=module.lora_B[adapter].weight.detach().float(),
                    scaling=float(module.scaling[adapter]),
                )
            )
    return ExportSource(
        model_directory=request.model_directory,
        family=family,
        model=model,
        layers=tuple(layers),
        tokenizer=loaded.tokenizer,
        stored_dtype=loaded.stored_dtype,
        device=layers[0].down.device,
        base_prefix=str(family.MODEL_CLASS.base_model_prefix),
    )
