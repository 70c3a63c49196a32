"""Loads bases through the stages that make them, without a run around: by the engine's reader, or by the library."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from gpu_service.catalog import families, methods, quantization
from gpu_service.catalog.weight_files import weights_digest
from gpu_service.engine.loading import config, weights
from gpu_service.engine.loading import quantization as quantization_stage
from gpu_service.engine.loading.work import Loaded, LoadRequest
from tunesmith.common.v1 import plan_pb2, training_spec_pb2


def load_base(
    directory: Path,
    *,
    cache: Path | None,
    quantizer: str = "own",
    method: str = "nf4",
    training_type: str = "qlora",
    model_type: str = "llama",
    double: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    digest: str | None = None,
) -> tuple[Loaded, dict[str, str]]:
    """What the stages made, and their details. `digest` None is the files' own."""
    settings = training_spec_pb2.Quantization(
        method=method, double_quantization=double, compute_dtype=str(compute_dtype).removeprefix("torch.")
    )
    request = LoadRequest(
        model_directory=directory,
        base_model="test/base",
        weights_digest=weights_digest(directory) if digest is None else digest,
        plan=plan_pb2.Plan(resolved=training_spec_pb2.Hyperparameters(quantization=settings), quantizer=quantizer),
        family=import_module(families.REGISTRY[model_type].builder),
        quantization=import_module(quantization.REGISTRY[method].builder),
        method=import_module(methods.REGISTRY[training_type].builder),
        compute_dtype=compute_dtype,
        device=torch.device(device),
        cache_directory=cache,
        quantizer=quantizer,
    )
    loaded = Loaded()
    details: dict[str, str] = {}
    for stage in (config, weights, quantization_stage):
        details |= stage.run(request, loaded, lambda done, total, unit: None)
    if loaded.copying is not None:
        loaded.copying.join()
    return loaded, details


def everything(model: Any) -> Iterator[tuple[str, Any]]:
    """Every tensor and every fact of a model that quantizing and loading decide, by name."""
    for name, module in model.named_modules():
        yield f"{name} class", type(module)
    for name, buffer in model.named_buffers():
        yield name, buffer
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, parameter.data
        yield f"{name} kind", (type(parameter), parameter.dtype, tuple(parameter.shape), parameter.requires_grad)
        state = getattr(parameter, "quant_state", None)
        if state is None:
            continue
        for part in ("blocksize", "compress_statistics", "quant_type", "quant_storage", "bnb_quantized"):
            yield f"{name} {part}", getattr(parameter, part)
        for label, one in (("state", state), ("state2", state.state2)):
            for part, value in sorted(vars(one).items() if one is not None else ()):
                if part != "state2":
                    yield f"{name} {label} {part}", value


def same(found: Any, expected: Any) -> None:
    """Assert that two bases are equal in every tensor and every fact."""
    ours, theirs = dict(everything(found)), dict(everything(expected))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert ours[name].dtype == value.dtype, name
            assert torch.equal(ours[name], value), name
        else:
            assert ours[name] == value, name
    for name in ("is_loaded_in_4bit", "hf_device_map", "quantization_method", "training", "dtype"):
        assert getattr(found, name, None) == getattr(expected, name, None), name
    assert found.config.to_dict() == expected.config.to_dict()
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()
