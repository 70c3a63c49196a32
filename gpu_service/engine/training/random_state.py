"""The state of every random generator that a training may draw from, as tensors and JSON values.

Of the accelerators that a machine has only the training's own counts, and it has no number in what is kept: a training
goes on upon another one. Reading a state makes no device wait: a CUDA generator's is kept on the host.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch

_TORCH = "torch"
_NUMPY = "numpy"
_CUDA = "cuda"


def seed_all(seed: int) -> None:
    """Seed torch (every device), Python and numpy. `seed` is any non-negative integer."""
    torch.manual_seed(seed)
    random.seed(seed)
    # Numpy takes 32 bits at a time.
    numpy.random.seed([seed & 0xFFFFFFFF, seed >> 32])


def capture(device: torch.device) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state now of the host's generators and, if it is one of CUDA, of `device`."""
    _, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)
    version, numbers, gauss_next = random.getstate()
    tensors = {_TORCH: torch.get_rng_state(), _NUMPY: torch.from_numpy(numpy.asarray(keys, dtype=numpy.int64))}
    if device.type == _CUDA:
        tensors[_CUDA] = torch.cuda.get_rng_state(device)
    values = {
        "python": {"version": version, "numbers": list(numbers), "gauss_next": gauss_next},
        "numpy": {"position": int(position), "has_gauss": int(has_gauss), "cached": float(cached)},
    }
    return tensors, values


def restore(tensors: dict[str, torch.Tensor], values: dict[str, Any], device: torch.device) -> None:
    """Put back what `capture` gave; an accelerator's state goes to `device`, and nowhere if that is not one of CUDA.

    Raises KeyError, ValueError.
    """
    torch.set_rng_state(tensors[_TORCH])
    if device.type == _CUDA and _CUDA in tensors:
        torch.cuda.set_rng_state(tensors[_CUDA], device)
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


@contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Afterwards the state is that of before."""
    before = capture(device)
    try:
        yield
    finally:
        restore(*before, device)
