"""Memory of the host that a GPU copies from and to by itself: page-locked, of exactly the size asked for, given back.

torch's own allocator of such memory rounds sizes up to powers of two and keeps what was freed for as long as the
process lives; an engine lives on after a run. Nothing is unmapped while it is locked: the next mapping may get its
address, and could not be locked any more.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref

import torch

# cudaErrorMemoryAllocation
_NO_MEMORY = 2


class PinnedMemory:
    """`bytes_` is uint8 [num_bytes] until `give_back`, or until nobody holds this any more."""

    def __init__(self, num_bytes: int) -> None:
        """Raises MemoryError where the host has none left to lock, torch.cuda.CudaError for anything else."""
        # Pages of its own: what is locked and unlocked is whole pages.
        mapping = mmap.mmap(-1, num_bytes)
        with contextlib.suppress(OSError):
            # Large pages are found and locked many times as fast; a kernel without them says so.
            mapping.madvise(mmap.MADV_HUGEPAGE)
        self.bytes_ = torch.frombuffer(mapping, dtype=torch.uint8)
        address = self.bytes_.data_ptr()
        code = torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0)
        if int(code) == _NO_MEMORY:
            raise MemoryError(f"the host has no {num_bytes} bytes that can be locked for its GPU")
        torch.cuda.check_error(code)
        self._unlock = weakref.finalize(self, _unlock, mapping, address)
        # The process' end does it too.
        self._unlock.atexit = False

    def give_back(self) -> None:
        """To the system, as soon as the last view is gone. Waits for what the GPU has in hand."""
        del self.bytes_
        self._unlock()


def _unlock(mapping: mmap.mmap, address: int) -> None:
    """`mapping` lives until it is unlocked."""
    torch.cuda.synchronize()
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))
    del mapping
