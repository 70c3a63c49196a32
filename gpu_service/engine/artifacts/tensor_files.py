"""Safetensors files one tensor at a time, both ways: a whole shard is never in memory.

The library maps what it reads; what it writes it wants whole, so the writer here lays out the format itself: length of
the header, header as JSON, tensors one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
# Headers are padded with spaces, so that tensors begin at a multiple of this.
_ALIGNMENT_BYTES = 8

Entry = tuple[str, tuple[int, ...], torch.dtype]


def shards_of(directory: Path) -> dict[str, list[str]]:
    """Each weight file of a model directory with the names of its tensors. Raises OSError, SafetensorError."""
    names = [SINGLE_FILE]
    if (directory / INDEX_FILE).is_file():
        weight_map = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    shards = {}
    for name in names:
        with TensorFile(directory / name) as file:
            shards[name] = file.names()
    return shards


class TensorFile:
    """A safetensors file, mapped. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self._opened = safe_open(path, framework="pt", device="cpu")
        self._file: Any = None

    def __enter__(self) -> TensorFile:
        self._file = self._opened.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def names(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Raises ValueError for a type that torch has and this does not write."""
        stored = self._file.get_slice(name).get_dtype()
        if stored not in _DTYPES:
            raise ValueError(f"{name} is stored as {stored}, which is no type of a weight here")
        return _DTYPES[stored]

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor


def write_tensors(path: Path, entries: Sequence[Entry], produce: Callable[[str], torch.Tensor]) -> int:
    """Write a safetensors file of `entries` (name, shape, type); `produce` is asked for one tensor after the other.

    What it gives is cast to the entry's type. The bytes of all tensors. Raises OSError, and ValueError for a tensor of
    another shape.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, dtype in entries:
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, shape, dtype in entries:
            tensor = produce(name)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} came out as {tuple(tensor.shape)}, not {shape}")
            plain = tensor.detach().to("cpu", dtype).contiguous().reshape(-1)
            if plain.numel():
                file.write(plain.view(torch.uint8).numpy().data)
    return offset
