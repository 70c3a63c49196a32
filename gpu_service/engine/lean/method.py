"""A LoRA adapter over a frozen base, with PEFT's names, order and first weights; the base may be lean or the library's.

Methods of the catalog have the same functions. What is saved is PEFT's form, and PEFT writes its config (`saving`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpu_service.engine.lean import saving
from gpu_service.engine.lean.model import linear_of
from gpu_service.engine.precision import DTYPES
from tunesmith.common.v1 import training_spec_pb2

TRAINS_ADAPTER = True
_NAME = "default"


class LeanLora(nn.Module):
    """A linear layer with A and B beside it, under the names that PEFT's layer has for them."""

    def __init__(
        self, base_layer: nn.Module, *, weights: tuple[torch.Tensor, torch.Tensor], scaling: float, dropout: float
    ) -> None:
        """`weights`: A [rank, inputs] and B [outputs, rank]."""
        super().__init__()
        below, above = weights
        self.base_layer = base_layer
        self.out_features, self.in_features = above.shape[0], below.shape[1]
        self.lora_dropout = nn.ModuleDict({_NAME: nn.Dropout(dropout) if dropout else nn.Identity()})
        self.lora_A = nn.ModuleDict({_NAME: linear_of(below)})
        self.lora_B = nn.ModuleDict({_NAME: linear_of(above)})
        self.r, self.scaling = {_NAME: below.shape[0]}, {_NAME: scaling}
        self.lora_variant: dict[str, Any] = {}


def _draw(
    sizes: tuple[int, int], rank: int, device: torch.device, compute_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first weights beside a layer of these (inputs, outputs), from the device's own generator: A uniform within
    one by the root of what it reads.
    """
    inputs, outputs = sizes
    below, above = (rank, inputs), (outputs, rank)
    if device.type == "cpu":
        # PEFT's layers draw on the host when they are made, both of them, and A once more; and they are in the type of
        # what they stand beside until all are made.
        for shape in (below, above):
            nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5))
        first = nn.init.kaiming_uniform_(torch.empty(below), a=math.sqrt(5)).to(compute_dtype).float()
    else:
        bound = inputs**-0.5
        first = torch.empty(below, device=device).uniform_(-bound, bound)
    return first, torch.zeros(above, device=device)


class _Adapted(nn.Module):
    def __init__(self, base: Any) -> None:
        super().__init__()
        self.model = base


class LeanAdapted(nn.Module):
    """Stands for a PEFT model to whatever holds tensors: the fast path, checkpoints, saving. Cannot run."""

    def __init__(self, base: Any, base_model: str, lora: training_spec_pb2.Lora) -> None:
        super().__init__()
        self.base_model = _Adapted(base)
        self._base_name, self._lora = base_model, lora

    def save_pretrained(self, directory: Path, **options: Any) -> None:
        """The adapter as PEFT would write it. The options are PEFT's, and mean nothing more here."""
        del options
        tensors = {name: value for name, value in self.named_parameters() if value.requires_grad}
        saving.write(directory, tensors, self._base_name, self._lora)


def base_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """Type that the base's unquantized weights are held in."""
    return compute_dtype


def prepare_base(model: Any) -> None:
    """Nothing: it was made frozen, and the fast path holds all of it in the compute type."""
    del model


def attach(base: Any, base_model: str, hyperparameters: training_spec_pb2.Hyperparameters) -> LeanAdapted:
    """The base with adapters on the layers that the plan names. Raises ValueError when there are none."""
    lora = hyperparameters.lora
    modules = dict(base.named_modules())
    # A target is a path, or the end of one.
    ends = tuple(f".{target}" for target in lora.target_modules)
    found = [path for path in modules if f".{path}".endswith(ends)]
    if not found:
        raise ValueError(f"no layer of the model is called {', '.join(sorted(lora.target_modules))}")
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    device = next(base.parameters()).device
    compute_dtype = DTYPES[hyperparameters.quantization.compute_dtype]
    for path in found:
        module, (parent, _, name) = modules[path], path.rpartition(".")
        weights = _draw((int(module.in_features), int(module.out_features)), lora.rank, device, compute_dtype)
        layer = LeanLora(module, weights=weights, scaling=lora.alpha / lora.rank, dropout=lora.dropout)
        setattr(modules[parent], name, layer)
    return LeanAdapted(base, base_model, lora)


def count_covered(model: Any) -> int:
    """Linear layers that got an adapter."""
    return sum(isinstance(module, LeanLora) for module in model.modules())


def detach(model: LeanAdapted) -> Any:
    """Take the adapter's layers out and return the base as it was."""
    base = model.base_model.model
    for path, module in list(base.named_modules()):
        if isinstance(module, LeanLora):
            _replace(base, path, module.base_layer)
    return base


def _replace(base: Any, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(base.get_submodule(parent), name, module)
