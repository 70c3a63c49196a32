"""The lean model over places that are filled elsewhere. Refuses a model that is not made of just these places."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from gpu_service.engine.fast_path.nf4 import BLOCK_WEIGHTS, NESTED_BLOCK
from gpu_service.engine.fast_path.quantizing import Tables
from gpu_service.engine.lean.model import LeanCausal
from gpu_service.engine.loading.places import Places
from gpu_service.engine.loading.work import Loaded, LoadRequest


@dataclass(kw_only=True)
class Nf4State:
    """What a quantized weight keeps beside it, under the names that bitsandbytes has for it."""

    absmax: torch.Tensor
    code: torch.Tensor
    blocksize: int
    quant_type: str = "nf4"
    offset: torch.Tensor | None = None
    state2: Nf4State | None = None

    @property
    def nested(self) -> bool:
        return self.state2 is not None


def build(request: LoadRequest, loaded: Loaded, places: Places) -> LeanCausal:
    """The model on its device, its tensors being the places."""
    with torch.device("meta"):
        model = LeanCausal(loaded.config)
    held: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    by_name: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            held.setdefault(parameter, []).append((module, leaf))
            by_name[f"{prefix}.{leaf}"] = parameter
    for name, place in places.plain.items():
        _put(held[by_name[name]], nn.Parameter(place, requires_grad=False))
    if places.layout.shapes:
        tables = Tables.on(request.device)
        for name in places.layout.shapes:
            _put(held[by_name[name]], _quantized(places, name, tables))
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.to(request.device)
    # The fast path moves plain tensors; whoever kept the first ones would keep their memory.
    model.places, model.plain_names = replace(places, plain={}), tuple(places.plain)
    return model


def _put(holders: list[tuple[nn.Module, str]], parameter: nn.Parameter) -> None:
    # Tied tensors have several.
    for module, leaf in holders:
        setattr(module, leaf, parameter)


def _quantized(places: Places, name: str, tables: Tables) -> nn.Parameter:
    parts = places.parts(name)
    nested = None
    if parts.nested_scales is not None:
        nested = Nf4State(absmax=parts.nested_scales, code=tables.nested_codes, blocksize=NESTED_BLOCK)
    weight = nn.Parameter(parts.packed, requires_grad=False)
    weight.quant_state = Nf4State(  # type: ignore[attr-defined]
        absmax=parts.scales, code=tables.codes, blocksize=BLOCK_WEIGHTS, offset=parts.offset, state2=nested
    )
    return weight
