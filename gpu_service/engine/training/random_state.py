"""The state of every random generator that training may draw from, as tensors and JSON values."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch

_TORCH = "torch"
_NUMPY = "numpy"
_CUDA = "cuda/"


def seed_all(seed: int) -> None:
    """Seed torch (every device), Python and numpy. `seed` is any non-negative integer."""
    torch.manual_seed(seed)
    random.seed(seed)
    # Numpy takes 32 bits at a time.
    numpy.random.seed([seed & 0xFFFFFFFF, seed >> 32])


def capture() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state now."""
    _, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    version, numbers, gauss_next = random.getstate()
    tensors = {_TORCH: torch.get_rng_state(), _NUMPY: torch.from_numpy(numpy.asarray(keys, dtype=numpy.int64))}
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"{_CUDA}{index}"] = state
    values = {
        "python": {"version": version, "numbers": list(numbers), "gauss_next": gauss_next},
        "numpy": {"position": int(position), "has_gauss": int(has_gauss), "cached": float(cached)},
    }
    return tensors, values


def restore(tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> None:
    """Put back what `capture` gave; devices that this machine does not have are passed over.

    Raises KeyError, ValueError.
    """
    torch.set_rng_state(tensors[_TORCH])
    for name, state in tensors.items():
        index = name.removeprefix(_CUDA)
        if name.startswith(_CUDA) and int(index) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(index))
    python = values["python"]
    random.setstate((python["version"], tuple(python["numbers"]), python["gauss_next"]))
    numpy_values = values["numpy"]
    numpy.random.set_state(
        (
            "MT19937",
            tensors[_NUMPY].numpy().astype(numpy.uint32),
            numpy_values["position"],
            numpy_values["has_gauss"],
            numpy_values["cached"],
        )
    )
