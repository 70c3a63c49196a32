"""Puts what an earlier job left into what is about to be trained: its adapter, or the weights of a checkpoint of it.

Every trained tensor must be there in its own shape, and no other: half an earlier job is no start. The optimizer is
none of this, it begins afresh. A whole model of an earlier job is read in stage WEIGHTS instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from gpu_service.engine import durable
from gpu_service.engine.loading.weights import MODEL_ARTIFACT
from gpu_service.engine.loading.work import Loaded
from gpu_service.engine.pace import Pace, in_one_piece
from gpu_service.engine.request import StartPoint
from gpu_service.engine.training.checkpoint import WEIGHTS_FILE

ADAPTER_ARTIFACT = "adapter"
ADAPTER_FILE = "adapter_model.safetensors"


class StartDoesNotFit(ValueError):
    """The earlier job's tensors are not those that are trained here."""


def put(start: StartPoint, loaded: Loaded, pace: Pace) -> dict[str, str]:
    """Change `loaded.model` in place. Raises StartDoesNotFit, DamagedDirectory, OSError, SafetensorError."""
    if start.name == MODEL_ARTIFACT:
        return {}
    if start.name == ADAPTER_ARTIFACT:
        loaded.file = f"start/{ADAPTER_FILE}"
        found = _read(start.directory / ADAPTER_FILE, pace)
        # Not imported where nothing is started from: it takes seconds.
        from peft import get_peft_model_state_dict

        # These are the model's own tensors, under the names that PEFT writes.
        wanted = get_peft_model_state_dict(loaded.model, save_embedding_layers=False)
    else:
        loaded.file = f"start/{WEIGHTS_FILE}"
        durable.read_manifest(start.directory, pace)
        found = _read(start.directory / WEIGHTS_FILE, pace)
        wanted = dict(_trained(loaded.model))
    _compare(found, wanted, start)
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])
    loaded.file = ""
    return {"start_from": start.name, "start_tensors": str(len(wanted))}


def _read(path: Path, pace: Pace) -> dict[str, torch.Tensor]:
    with in_one_piece(pace, path.stat().st_size):
        return load_file(path)


def _trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _compare(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], start: StartPoint) -> None:
    if found.keys() != wanted.keys():
        odd = sorted(found.keys() ^ wanted.keys())
        raise StartDoesNotFit(
            f"{start.name} of the earlier job has {len(found)} tensors and {len(wanted)} are trained here; "
            f"not in both: {', '.join(odd[:3])}"
        )
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            shape, shape_here = tuple(found[name].shape), tuple(tensor.shape)
            raise StartDoesNotFit(f"{name} is {shape} in {start.name} of the earlier job, and {shape_here} here")
