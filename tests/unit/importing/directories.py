"""Tiny model directories for tests, written byte by byte: no torch, no transformers."""

from __future__ import annotations

import json
import struct
from pathlib import Path


def write_safetensors(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """Float32 zeros of the given shapes."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in tensors.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(end))


def write_model(directory: Path) -> Path:
    directory.mkdir(parents=True)
    write_json(directory / "config.json", {"model_type": "llama"})
    write_json(directory / "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    write_json(directory / "tokenizer.json", {})
    write_safetensors(directory / "model.safetensors", {"a": (2, 3), "b": (4,)})
    return directory


def write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")
