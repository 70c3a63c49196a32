"""Where the tensors of weight files go, when the model holds tensor for tensor what the files do; says so when not.

Plain tensors get memory of their own on the device, in the type that the base is held in. Matrices that are to be
quantized share one buffer (`reading.flat_nf4`). Reads nothing but headers, and makes no model that computes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gpu_service.engine.fast_path.nf4 import BLOCK_WEIGHTS
from gpu_service.engine.loading.work import LoadRequest
from gpu_service.engine.reading.flat_nf4 import Layout, Parts
from gpu_service.engine.reading.stored import StoredTensor

Shape = tuple[int, ...]


class NotTensorForTensor(ValueError):
    """The files hold other tensors than the model: renamed, tied otherwise, of other shapes, too many or too few."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """`layout` and `buffer` hold what is quantized; the rest has tensors of its own, `plain`, by name."""

    stored: Mapping[str, StoredTensor]
    plain: Mapping[str, torch.Tensor]
    layout: Layout
    buffer: torch.Tensor

    def parts(self, name: str) -> Parts:
        return self.layout.parts(name, self.buffer)


def base_dtype(request: LoadRequest) -> torch.dtype:
    """The type that the base is held in, and quantized from."""
    dtype: torch.dtype = request.method.base_dtype(request.compute_dtype)
    return dtype


def lay_out(request: LoadRequest, config: Any, stored: Mapping[str, StoredTensor]) -> Layout:
    """What is to be quantized. Raises NotTensorForTensor."""
    quantized = _find_quantized(request, config, stored)
    return Layout.of(quantized, double=request.plan.resolved.quantization.double_quantization)


def make(request: LoadRequest, stored: Mapping[str, StoredTensor], layout: Layout) -> Places:
    """Empty places on the request's device."""
    return Places(
        stored=stored,
        plain={
            name: torch.empty(tensor.shape, dtype=base_dtype(request), device=request.device)
            for name, tensor in stored.items()
            if name not in layout.shapes
        },
        layout=layout,
        buffer=torch.empty(layout.num_bytes, dtype=torch.uint8, device=request.device),
    )


def make_zeros(request: LoadRequest, config: Any) -> Places:
    """Places of a whole quantized model that nothing is read into."""
    with torch.device("meta"):
        model = request.family.MODEL_CLASS(config)
    layout = Layout.of(
        {name: tuple(model.get_parameter(name).shape) for name in _linears(model)},
        double=request.plan.resolved.quantization.double_quantization,
    )
    return Places(
        stored={},
        plain={
            name: torch.zeros(parameter.shape, dtype=base_dtype(request), device=request.device)
            for name, parameter in model.named_parameters()
            if name not in layout.shapes
        },
        layout=layout,
        buffer=torch.zeros(layout.num_bytes, dtype=torch.uint8, device=request.device),
    )


def _linears(model: Any) -> list[str]:
    """Weights that are quantized: transformers quantizes linear layers but the head."""
    head = model.get_output_embeddings()
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and module is not head
    ]


def _find_quantized(request: LoadRequest, config: Any, stored: Mapping[str, StoredTensor]) -> dict[str, Shape]:
    """Names and shapes of what is to be quantized, of a model without memory that is compared with the files."""
    with torch.device("meta"):
        model = request.family.MODEL_CLASS(copy.deepcopy(config))
    shapes: dict[str, Shape] = {}
    names_by_tensor: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shapes[name] = tuple(parameter.shape)
        names_by_tensor.setdefault(id(parameter), []).append(name)
    for names in names_by_tensor.values():
        if sum(name in stored for name in names) != 1:
            raise NotTensorForTensor(f"{names[0]} is not in the files exactly once")
    for name, tensor in stored.items():
        if tensor.shape != shapes.get(name):
            raise NotTensorForTensor(f"{name} is {tensor.shape} in the files and {shapes.get(name)} in the model")
    if not request.quantization.IS_QUANTIZED:
        return {}
    linears = _linears(model)
    for name in linears:
        if shapes[name][1] % BLOCK_WEIGHTS:
            raise NotTensorForTensor(f"rows of {name} are no whole number of blocks")
    return {name: shapes[name] for name in linears}
