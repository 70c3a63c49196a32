"""Takes the place of a GPU's recordings: what was recorded is run again, and times are as they are told."""

from __future__ import annotations

from collections.abc import Callable

from gpu_service.engine.fast_path.recorder import Took

_LAUNCHED, _PLAYED = Took(handing_out=1.0, whole=1.0), Took(handing_out=0.1, whole=0.5)


class RunAgain:
    """`fails` is raised at the first recording. A pass takes `taken_bytes`, and recordings have `held_bytes`."""

    def __init__(
        self,
        *,
        launched: Took = _LAUNCHED,
        played: Took = _PLAYED,
        free_bytes: int = 2**40,
        taken_bytes: int = 0,
        held_bytes: int = 0,
        fails: Exception | None = None,
    ) -> None:
        self._launched, self._played = launched, played
        self._free_bytes = free_bytes
        self._taken_bytes, self._held_after = taken_bytes, held_bytes
        self._held_bytes = 0
        self._fails = fails
        self.num_plays = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        if self._fails is not None:
            raise self._fails
        self._held_bytes = self._held_after
        # As capturing does: the backward pass finds what the forward pass left.
        work()

        def play() -> None:
            self.num_plays += 1
            work()

        return play

    def time(self, work: Callable[[], None]) -> Took:
        plays = self.num_plays
        work()
        return self._launched if self.num_plays == plays else self._played

    def taken_bytes(self, work: Callable[[], None]) -> int:
        work()
        return self._taken_bytes

    def held_bytes(self) -> int:
        return self._held_bytes

    def free_bytes(self) -> int:
        return self._free_bytes - self._held_bytes
