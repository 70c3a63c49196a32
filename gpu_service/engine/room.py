"""Room on the disk: whether what is about to be written fits, and waiting until there is some again.

safetensors tells a full disk by an exception of its own without a number, and deletes what it had written; so its size
is compared with the free space, before and after. Writes nothing.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

# The small files beside tensors: manifests, settings, generators.
_BESIDE_BYTES = 256 * 1024
_LOOK_AGAIN_SECONDS = 0.5


def tensors_bytes(tensors: Mapping[str, Any]) -> int:
    """What tensors by name take in a file, without its header."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def require(directory: Path, num_bytes: int) -> None:
    """Raises OSError ENOSPC when so much, and small files beside it, does not fit where `directory` is."""
    free_bytes = shutil.disk_usage(directory).free
    needed_bytes = num_bytes + _BESIDE_BYTES
    if needed_bytes > free_bytes:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed_bytes} bytes are needed, {free_bytes} free")


@contextmanager
def required(directory: Path, num_bytes: int) -> Iterator[None]:
    """`require`, then a block that writes so much with safetensors: what fails in it for want of room is OSError."""
    require(directory, num_bytes)
    try:
        yield
    except SafetensorError:
        require(directory, num_bytes)
        raise


def wait_for_room(check: Callable[[], None]) -> None:
    """A pause after a write that found none; `check` raises to end the waiting."""
    check()
    time.sleep(_LOOK_AGAIN_SECONDS)
