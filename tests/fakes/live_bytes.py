"""Counts the bytes of tensors that are alive, as an allocator would, without one: on a meta device, so for any size.

What the kernels' references allocate inside is no kernel's doing, and does not count; what they give back does.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NOT_OURS = ("torch_reference.py", "fp8_reference.py", "flat_attention.py")


class LiveBytes(TorchDispatchMode):
    """Inside it, `now` and `peak` are bytes of storages that were made inside it and live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _is_within_a_reference():
            self.see([result, args, kwargs or {}])
        return result

    def ignore(self, *tensors: torch.Tensor) -> None:
        """These were there before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._known[storage._cdata] = 0
                weakref.finalize(storage, self._known.pop, storage._cdata, None)

    def see(self, given: Any) -> Any:
        """What a reference gave back."""
        for leaf in tree_leaves(given):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return given

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or storage.device.type != "meta":
            return
        self._known[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


def _is_within_a_reference() -> bool:
    frame = sys._getframe(2)
    for _ in range(24):
        if frame is None:
            return False
        if frame.f_code.co_filename.endswith(_NOT_OURS):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
