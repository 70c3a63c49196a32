"""Where each tensor of a safetensors file lies: the header, read once. Reads no tensor.

Refuses a file whose header is not whole; safetensors itself is asked for its verdict first by whoever loads a model.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

_LENGTH_BYTES = 8
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class NoSafetensors(ValueError):
    """A file is no whole safetensors file, or holds numbers of a type that is not read here."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """`offset` is from the start of the file."""

    name: str
    file: Path
    offset: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> tuple[int, list[StoredTensor]]:
    """Bytes before the first tensor, and the tensors in the order that they lie in. Raises OSError, NoSafetensors."""
    with path.open("rb") as file:
        size_bytes = file.seek(0, 2)
        file.seek(0)
        prefix = file.read(_LENGTH_BYTES)
        if len(prefix) < _LENGTH_BYTES:
            raise NoSafetensors(f"{path.name} has no header")
        (length,) = struct.unpack("<Q", prefix)
        start = _LENGTH_BYTES + length
        if start > size_bytes:
            raise NoSafetensors(f"{path.name} ends in its header")
        document = json.loads(file.read(length))
    tensors = []
    for name, facts in document.items():
        if name == "__metadata__":
            continue
        dtype, shape = DTYPES.get(facts["dtype"]), tuple(facts["shape"])
        if dtype is None:
            raise NoSafetensors(f"{path.name} holds {name!r} as {facts['dtype']}")
        first, end = facts["data_offsets"]
        if end - first != math.prod(shape) * dtype.itemsize or start + end > size_bytes:
            raise NoSafetensors(f"{path.name} does not hold {name!r} whole")
        tensors.append(
            StoredTensor(name=name, file=path, offset=start + first, num_bytes=end - first, dtype=dtype, shape=shape)
        )
    return start, sorted(tensors, key=lambda tensor: tensor.offset)


def most_common_dtype(tensors: Iterable[StoredTensor]) -> torch.dtype:
    """The type that most numbers are in; float32 where there are none."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.num_elements
    return sizes.most_common(1)[0][0] if sizes else torch.float32
