"""Memory of the host that a GPU copies from and to by itself: page-locked, of exactly the size asked for, given back.

torch's own allocator of such memory rounds sizes up to powers of two and keeps what was freed for as long as the
process lives; an engine lives on after a run. Refuses to guess whether copies are done: whoever gives it back knows.
"""

from __future__ import annotations

import mmap

import torch

# cudaErrorMemoryAllocation
_NO_MEMORY = 2


class PinnedMemory:
    """`bytes_` is uint8 [num_bytes] until `give_back`."""

    def __init__(self, num_bytes: int) -> None:
        """Raises MemoryError where the host has none left to lock, torch.cuda.CudaError for anything else."""
        # Pages of its own: what is locked and unlocked is whole pages.
        self._mapping = mmap.mmap(-1, num_bytes)
        self.bytes_ = torch.frombuffer(self._mapping, dtype=torch.uint8)
        code = torch.cuda.cudart().cudaHostRegister(self.bytes_.data_ptr(), num_bytes, 0)
        if int(code) == _NO_MEMORY:
            raise MemoryError(f"the host has no {num_bytes} bytes that can be locked for its GPU")
        torch.cuda.check_error(code)

    def give_back(self) -> None:
        """To the system, as soon as the last view is gone. No copy may be under way."""
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self.bytes_.data_ptr()))
        del self.bytes_, self._mapping
