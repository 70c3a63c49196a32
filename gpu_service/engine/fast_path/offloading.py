"""Where inputs of recomputed blocks wait: locked memory of the host. On CUDA copies run beside the kernels.

Two rows of tensors are on their way at most in either direction, so that the device holds two of them and not one a
block. Knows numbers and tensors; which blocks and when is the decoder's business.
"""

from __future__ import annotations

from typing import Any

import torch

from gpu_service.domain.recomputation import place_bytes
from gpu_service.engine.fast_path.pinned_memory import PinnedMemory


class HostShelf:
    """Tensors [T, H] by number, put in ascending order and taken in descending order, each once.

    Host memory is kept from pass to pass, until `close`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if self._is_cuda else None
        # uint8, as large as the largest that had this number.
        self._places: dict[int, torch.Tensor] = {}
        self._pinned: dict[int, PinnedMemory] = {}
        # Tensors on their way, by number, with the event of the end of the copy: not to be reused before.
        self._leaving: dict[int, tuple[torch.Tensor, Any]] = {}
        self._order: list[int] = []
        self._coming: tuple[int, torch.Tensor, Any] | None = None
        self._kinds: dict[int, tuple[torch.Size, torch.dtype]] = {}

    @property
    def held_bytes(self) -> int:
        """Host memory that `close` gives back."""
        return sum(len(place) for place in self._places.values())

    def clear(self) -> None:
        """A new pass begins: what an earlier one left, because it failed, is forgotten. Host memory is kept."""
        if self._is_cuda:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._leaving, self._order, self._coming = {}, [], None

    def close(self) -> None:
        """Give all host memory back, once no copy is under way. It may be used again afterwards, from nothing."""
        self._leaving, self._order, self._coming = {}, [], None
        self._places = {}
        for memory in self._pinned.values():
            memory.give_back()
        self._pinned = {}

    def put(self, number: int, tensor: torch.Tensor) -> None:
        """Begin to copy `tensor` away. Nothing may write to it any more; its memory is free at the put after next."""
        if len(self._leaving) > 1:
            _, done = self._leaving.pop(next(iter(self._leaving)))
            self._wait(done)
        place = self._place(number, tensor)
        self._kinds[number] = (tensor.shape, tensor.dtype)
        self._order.append(number)
        self._leaving[number] = (tensor, self._copy(tensor, place))

    def take(self, number: int) -> torch.Tensor:
        """The tensor, on the device again; the one that was put before it begins to come."""
        assert self._order[-1] == number, "taken in another order than put"
        self._order.pop()
        if number in self._leaving:
            # The last ones put are still here.
            tensor, done = self._leaving.pop(number)
        else:
            _, tensor, done = self._coming if self._coming is not None else self._fetch(number)
            self._coming = None
        self._wait(done)
        following = self._order[-1] if self._order else None
        if following is not None and following not in self._leaving:
            self._coming = self._fetch(following)
        return tensor

    def _place(self, number: int, like: torch.Tensor) -> torch.Tensor:
        """Host memory for the tensor."""
        num_bytes = like.numel() * like.element_size()
        known = self._places.get(number)
        if known is None or len(known) < num_bytes:
            self._places.pop(number, None)
            self._places[number] = known = self._allocate(number, place_bytes(num_bytes))
        return known[:num_bytes].view(like.dtype).view(like.shape)

    def _allocate(self, number: int, num_bytes: int) -> torch.Tensor:
        if not self._is_cuda:
            return torch.empty(num_bytes, dtype=torch.uint8)
        smaller = self._pinned.pop(number, None)
        if smaller is not None:
            smaller.give_back()
        self._pinned[number] = memory = PinnedMemory(num_bytes)
        return memory.bytes_

    def _fetch(self, number: int) -> tuple[int, torch.Tensor, Any]:
        shape, dtype = self._kinds[number]
        place = self._places[number][: shape.numel() * dtype.itemsize].view(dtype).view(shape)
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        return number, tensor, self._copy(place, tensor)

    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> Any:
        """Copy beside the kernels, after all that was launched so far; the event of its end."""
        if not self._is_cuda:
            target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._stream)
        return done

    def _wait(self, done: Any) -> None:
        """Let what is launched from now on run after the copy."""
        if done is not None:
            torch.cuda.current_stream(self._device).wait_event(done)
