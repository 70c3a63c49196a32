"""`merged`: the base's original weights with the adapter's difference added, in 16 bits, shard by shard.

Each tensor is read from the base's own files, never from a quantized copy: what 4 bits lost would be lost for good. The
sum is made in float32 and rounded once. One tensor is in memory at a time. Tensors keep their names and shards, so that
whatever loads the base loads this; embeddings that are tied stay so, because no adapter covers them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from gpu_service.engine.artifacts.export_source import AdapterLayer, ExportSource
from gpu_service.engine.artifacts.tensor_files import TensorFile, shards_of, write_tensors

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INDEX_FILE = "model.safetensors.index.json"
# Settings files that go along as they are.
_COPIED = ("generation_config.json",)


class LayerNotInFiles(ValueError):
    """The adapter covers a layer that no weight file has under its name."""


def write(source: ExportSource, directory: Path, check: Callable[[], None]) -> None:
    """Write weights, config, generation config and tokenizer. Raises LayerNotInFiles, OSError, SafetensorError."""
    dtype = torch.float16 if source.stored_dtype is torch.float16 else torch.bfloat16
    layers = {f"{layer.path}.weight": layer for layer in source.layers}
    shards = shards_of(source.model_directory)
    places = _match(layers, [name for names in shards.values() for name in names], source.base_prefix)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for shard, names in shards.items():
        with TensorFile(source.model_directory / shard) as stored:
            entries = [(name, stored.shape(name), _target(stored.dtype(name), dtype)) for name in names]

            def produce(name: str, stored: TensorFile = stored) -> torch.Tensor:
                check()
                return _merge(stored.read(name), places.get(name), source.device)

            total_bytes += write_tensors(directory / shard, entries, produce)
        weight_map |= dict.fromkeys(names, shard)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (directory / _INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")
    _write_settings(source, directory, dtype)


def _match(layers: Mapping[str, AdapterLayer], names: list[str], prefix: str) -> dict[str, AdapterLayer]:
    """Which tensor of the files each covered layer is; files of a bare decoder leave out the model's prefix."""
    held = set(names)
    places: dict[str, AdapterLayer] = {}
    for name, layer in layers.items():
        bare = name.removeprefix(f"{prefix}.")
        found = name if name in held else bare
        if found not in held:
            raise LayerNotInFiles(f"the base's files have no tensor {name}, which the adapter changes")
        places[found] = layer
    return places


def _target(stored: torch.dtype, wanted: torch.dtype) -> torch.dtype:
    # What is no floating-point number (a table of indices) stays as it is.
    return wanted if stored in _FLOATS else stored


def _merge(stored: torch.Tensor, layer: AdapterLayer | None, device: torch.device) -> torch.Tensor:
    if layer is None:
        return stored
    return stored.to(device, torch.float32) + layer.difference()


def _write_settings(source: ExportSource, directory: Path, dtype: torch.dtype) -> None:
    """A config that says the type of these weights, and nothing of how the base was held while it was trained."""
    config: dict[str, Any] = json.loads((source.model_directory / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    config.setdefault("model_type", source.family.CONFIG_CLASS.model_type)
    config.setdefault("architectures", [source.family.MODEL_CLASS.__name__])
    # transformers 4 reads the one name, 5 the other; both name the same.
    config["torch_dtype"] = config["dtype"] = str(dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in _COPIED:
        if (source.model_directory / name).is_file():
            shutil.copyfile(source.model_directory / name, directory / name)
    source.tokenizer.save_pretrained(directory)
