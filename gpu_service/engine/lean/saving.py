"""Writes a lean adapter as PEFT writes one of its own: the tensors here, the config by PEFT itself. Nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from gpu_service.engine import libraries
from tunesmith.common.v1 import training_spec_pb2

_TENSORS_FILE = "adapter_model.safetensors"


def write(directory: Path, tensors: Mapping[str, torch.Tensor], base_model: str, lora: training_spec_pb2.Lora) -> None:
    """`tensors` by the names of the model. Imports the libraries. Raises OSError, SafetensorError."""
    libraries.need()
    from gpu_service.engine.builders.methods.lora import make_config

    config = make_config(lora)
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    directory.mkdir(parents=True, exist_ok=True)
    named = {name.replace(".default.", "."): value.detach().contiguous() for name, value in tensors.items()}
    save_file(named, directory / _TENSORS_FILE, metadata={"format": "pt"})
    config.save_pretrained(directory)
