"""Puts a trained adapter onto a resident base for one answer. Taking it off is the training method's own `detach`.

Made as for training, from the adapter's config and tensors, or from a checkpoint's tensors and the settings of its
run: PEFT's own loader may hang hooks of accelerate onto the base, which would stay. Refuses an adapter whose tensors
are not exactly those of its config.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from gpu_service.engine.generation.order import LoraSettings
from gpu_service.engine.training.checkpoint import WEIGHTS_FILE as CHECKPOINT_FILE

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# How PEFT names a layer's first matrix in the model that it makes.
_PREFIX, _SUFFIX = "base_model.model.", ".lora_A.default.weight"


class AdapterUnusable(ValueError):
    """The adapter's files do not go together, or not with this base."""


def attach(base: Any, directory: Path, lora: LoraSettings) -> Any:
    """A PEFT model around `base` with the adapter's weights, nothing of it trainable; `lora` is a checkpoint's.

    Raises AdapterUnusable, and what PEFT, safetensors and torch raise for files that are broken.
    """
    if (directory / CHECKPOINT_FILE).is_file():
        return _attach_checkpoint(base, directory / CHECKPOINT_FILE, lora)
    config = LoraConfig.from_pretrained(str(directory))
    if config.init_lora_weights is not True:
        # Some of these change the base's own weights.
        raise AdapterUnusable(f"{CONFIG_FILE} asks for the initialization {config.init_lora_weights!r}")
    config.inference_mode = True
    tensors = load_file(directory / WEIGHTS_FILE)
    model = get_peft_model(base, config)
    _compare(get_peft_model_state_dict(model, save_embedding_layers=False), tensors, WEIGHTS_FILE)
    set_peft_model_state_dict(model, tensors)
    return model


def _attach_checkpoint(base: Any, path: Path, lora: LoraSettings) -> Any:
    """The layers that the adapter covers are those that the checkpoint has tensors of."""
    tensors = load_file(path)
    paths = [name.removeprefix(_PREFIX).removesuffix(_SUFFIX) for name in tensors if name.endswith(_SUFFIX)]
    if not paths:
        raise AdapterUnusable(f"{CHECKPOINT_FILE} has no adapter")
    model = get_peft_model(base, LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=paths, bias="none"))
    # A checkpoint has what was trained, under the model's own names.
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    _compare(trained, tensors, CHECKPOINT_FILE)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])
            parameter.requires_grad_(False)
    return model


def _compare(expected: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], file: str) -> None:
    """Raises AdapterUnusable."""
    if expected.keys() != tensors.keys():
        odd = sorted(expected.keys() ^ tensors.keys())
        raise AdapterUnusable(f"{len(odd)} tensors are missing or too many in {file}, e.g. {odd[0]}")
    for name, tensor in expected.items():
        if tensor.shape != tensors[name].shape:
            raise AdapterUnusable(f"{name} is {tuple(tensors[name].shape)} in {file}, and {tuple(tensor.shape)} here")
