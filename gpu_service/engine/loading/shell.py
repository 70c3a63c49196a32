"""The model over places that are filled elsewhere: transformers makes it of stand-ins, which then give way to them.

A stand-in has the name, type and shape of a tensor and the memory of one number, so `from_pretrained` does all that it
does with a checkpoint (with one that was quantized before, where layers are), and copies and quantizes nothing. Layers
get bitsandbytes' own weights and states. Refuses a model that was not made of just these stand-ins.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from gpu_service.engine.fast_path.nf4 import BLOCK_WEIGHTS, NESTED_BLOCK
from gpu_service.engine.fast_path.quantizing import Tables
from gpu_service.engine.loading.building import from_tensors
from gpu_service.engine.loading.places import NotTensorForTensor, Places, base_dtype
from gpu_service.engine.loading.work import Loaded, LoadRequest

# Stand-ins lie on a CPU: on a device, transformers would set memory aside for a second model.
_STAND_IN_DEVICE = "cpu"


def build(request: LoadRequest, loaded: Loaded, places: Places) -> Any:
    """The model on its device, its tensors being the places. Raises NotTensorForTensor, what from_pretrained raises."""
    config = loaded.config
    stand_ins = {name: _stand_in(place.shape, place.dtype) for name, place in places.plain.items()}
    if places.layout.shapes:
        settings = request.plan.resolved.quantization
        config = copy.deepcopy(config)
        # As a checkpoint says that it is quantized already.
        config.quantization_config = request.quantization.build_config(
            double_quantization=settings.double_quantization, compute_dtype=request.compute_dtype
        ).to_dict()
        stand_ins |= {name: _stand_in(places.parts(name).packed.shape, torch.uint8) for name in places.layout.shapes}
    model, report = from_tensors(request, loaded, config, stand_ins, device=_STAND_IN_DEVICE)
    odd = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[kind]]
    if odd or request.quantization.count_quantized(model) != len(places.layout.shapes):
        raise NotTensorForTensor(f"transformers makes another model of the tensors ({len(odd)} are not at their place)")
    held = dict(model.named_parameters(remove_duplicate=False))
    for name, stand_in in stand_ins.items():
        if held[name].data_ptr() != stand_in.data_ptr():
            raise NotTensorForTensor(f"transformers changes {name} as it places it")
    for name, place in places.plain.items():
        held[name].data = place
    _give_quantized(model, request, places)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(request.device))
    if hasattr(model, "hf_device_map"):
        model.hf_device_map = {"": str(request.device)}
    return model


def _stand_in(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros((), dtype=dtype).expand(shape)


def _give_quantized(model: Any, request: LoadRequest, places: Places) -> None:
    if not places.layout.shapes:
        return
    # Not imported where nothing is quantized: it takes seconds.
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    tables = Tables.on(request.device)
    for name, shape in places.layout.shapes.items():
        layer, parts = model.get_submodule(name.removesuffix(".weight")), places.parts(name)
        nested = None
        if parts.nested_scales is not None:
            nested = QuantState(
                absmax=parts.nested_scales, code=tables.nested_codes, blocksize=NESTED_BLOCK, dtype=torch.float32
            )
        state = QuantState(
            absmax=parts.scales,
            shape=torch.Size(shape),
            code=tables.codes,
            blocksize=BLOCK_WEIGHTS,
            quant_type="nf4",
            dtype=base_dtype(request),
            offset=parts.offset,
            state2=nested,
        )
        layer.weight = Params4bit(
            parts.packed,
            requires_grad=False,
            quant_state=state,
            blocksize=BLOCK_WEIGHTS,
            compress_statistics=places.layout.double,
            quant_type="nf4",
            quant_storage=torch.uint8,
            module=layer,
            bnb_quantized=True,
        )
        layer.quant_state = state
