"""Puts a trained adapter onto a resident base for one answer. Taking it off is the training method's own `detach`.

Made as for training, from the adapter's config and tensors: PEFT's own loader may hang hooks of accelerate onto the
base, which would stay. Refuses an adapter whose tensors are not exactly those of its config.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


class AdapterUnusable(ValueError):
    """The adapter's files do not go together, or not with this base."""


def attach(base: Any, directory: Path) -> Any:
    """A PEFT model around `base` with the adapter's weights, nothing of it trainable.

    Raises AdapterUnusable, and what PEFT, safetensors and torch raise for files that are broken.
    """
    config = LoraConfig.from_pretrained(str(directory))
    if config.init_lora_weights is not True:
        # Some of these change the base's own weights.
        raise AdapterUnusable(f"{CONFIG_FILE} asks for the initialization {config.init_lora_weights!r}")
    config.inference_mode = True
    tensors = load_file(directory / WEIGHTS_FILE)
    model = get_peft_model(base, config)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    if expected.keys() != tensors.keys():
        odd = sorted(expected.keys() ^ tensors.keys())
        raise AdapterUnusable(f"{len(odd)} tensors are missing or too many in {WEIGHTS_FILE}, e.g. {odd[0]}")
    set_peft_model_state_dict(model, tensors)
    return model
