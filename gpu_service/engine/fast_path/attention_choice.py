"""Which kernels attend on a GPU from Hopper on: the fastest for each kind of pass, timed at the first one of its kind.

The choice is kept from then on, and said. FlashAttention-4 is a candidate where it is installed, as soon as it is ready
(`flash_attention_4`); what was chosen before is timed once more then. Decides nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gpu_service.engine.fast_path.attention import Attention, Bounds, CudnnAttention, FlashAttention
from gpu_service.engine.fast_path.flash_attention_4 import UNUSABLE, Preparation, is_installed
from gpu_service.engine.fast_path.frames import SHORTEST_EVEN

_TIMED_PASSES = 4
# About 10 ms, in which any host hands out those passes.
_HEAD_START_CYCLES = 20_000_000
# Each is timed, and cuDNN makes a plan for each: where lengths are many, one kernel for all of them is the better.
_MOST_EVEN_KINDS = 16
# So that nothing stands beside the first steps of a run, for which people wait.
_CALLS_BEFORE_PREPARING = 200

Clock = Callable[[Attention, torch.Tensor, torch.Tensor, torch.Tensor, Bounds], float]
# Whether all sequences have one length that cuDNN is tried at; tokens and the longest, of others as powers of two.
_Kind = tuple[bool, int, int]


class AttentionChoice:
    """`clock` is for tests: milliseconds of a pass; None is the device's own."""

    lengths_may_vary = True

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or time_on_device
        self._flash: Attention = FlashAttention()
        self._cudnn: Attention = CudnnAttention()
        self._newest: Attention | None = None
        self._preparation: Preparation | None = None
        self._is_wanted = is_installed()
        self._calls = 0
        self._chosen: dict[_Kind, Attention] = {}
        self._notices: list[str] = []

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Bounds
    ) -> tuple[torch.Tensor, Any]:
        chosen = self._choose(query, key, value, bounds)
        output, kept = chosen.forward(query, key, value, bounds)
        return output, (chosen, kept)

    def backward(
        self,
        gradient: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        kept: Any,
        bounds: Bounds,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        chosen, rest = kept
        gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = chosen.backward(
            gradient, query, key, value, output, rest, bounds
        )
        return gradients

    def take_notices(self) -> list[str]:
        """What was decided since the last time, for people."""
        notices, self._notices = self._notices, []
        return notices

    def prepare(self, query: torch.Tensor, key: torch.Tensor, *, waits: bool) -> None:
        """Begin to make FlashAttention-4 ready for such heads, if it is installed; `waits` until it is."""
        if self._is_wanted and self._preparation is None:
            self._preparation = Preparation(query, key)
        if waits and self._preparation is not None:
            self._preparation.wait()

    def _choose(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Bounds) -> Attention:
        kind = self._kind_of(len(query), bounds)
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            # Nothing can be timed now; the same pass was made just before.
            return self._chosen.get(kind, self._flash)
        # Who asks torch for the same bits each time gets them from FlashAttention-2's kernels alone.
        if torch.are_deterministic_algorithms_enabled():
            return self._flash
        self._look_for_newest(query, key)
        candidates = self._candidates(kind)
        if len(candidates) == 1:
            return self._flash
        if kind not in self._chosen:
            times = {name: self._time(one, query, key, value, bounds) for name, one in candidates.items()}
            fastest = min(times, key=lambda name: times[name])
            self._chosen[kind] = candidates[fastest]
            self._notices.append(_describe(kind, fastest, times))
        return self._chosen[kind]

    def _kind_of(self, num_tokens: int, bounds: Bounds) -> _Kind:
        longest = bounds.longest
        is_even = not bounds.lengths_vary and all(length == longest for length in bounds.layout.lengths)
        if is_even and longest >= SHORTEST_EVEN:
            kind = (True, num_tokens, longest)
            if kind in self._chosen or sum(known[0] for known in self._chosen) < _MOST_EVEN_KINDS:
                return kind
        return False, _power_of_two(num_tokens), _power_of_two(longest)

    def _candidates(self, kind: _Kind) -> dict[str, Attention]:
        is_even, *_ = kind
        candidates = {"FlashAttention-2": self._flash}
        if is_even:
            candidates["cuDNN"] = self._cudnn
        if self._newest is not None:
            candidates["FlashAttention-4"] = self._newest
        return candidates

    def _look_for_newest(self, query: torch.Tensor, key: torch.Tensor) -> None:
        if not self._is_wanted:
            return
        self._calls += 1
        if self._calls >= _CALLS_BEFORE_PREPARING:
            self.prepare(query, key, waits=False)
        if self._preparation is None or not self._preparation.is_over:
            return
        self._is_wanted = False
        self._newest, problem = self._preparation.take()
        if problem:
            self._notices.append(f"FlashAttention-4 is installed and cannot be used: {problem}")
        self._chosen.clear()

    def _time(
        self, one: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Bounds
    ) -> float:
        if one is not self._newest:
            return self._clock(one, query, key, value, bounds)
        try:
            return self._clock(one, query, key, value, bounds)
        except torch.OutOfMemoryError:
            # Says nothing of the kernels; whoever makes the pass keeps less and begins again.
            raise
        except UNUSABLE as error:
            # Made ready for these heads, but not for a pass of this kind: the others attend to it.
            self._notices.append(f"FlashAttention-4 was given up: {type(error).__name__}: {error}")
            self._newest = None
            return float("inf")


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _describe(kind: _Kind, fastest: str, times: dict[str, float]) -> str:
    is_even, num_tokens, longest = kind
    what = f"rows of {longest} tokens" if is_even else f"sequences of up to {longest} tokens"
    measured = ", ".join(f"{name} {took:.2f} ms" for name, took in times.items())
    return f"attention of passes of {'' if is_even else 'up to '}{num_tokens} tokens in {what}: {fastest} ({measured})"


def time_on_device(
    attention: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Bounds
) -> float:
    """Milliseconds of the kernels of a pass forward and back, once it is warm. The host waits for the device."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for number in range(_TIMED_PASSES):
        if number == 1:
            # The device begins behind the host, and stays there: else a slow host's launches would be timed.
            torch.cuda._sleep(_HEAD_START_CYCLES)
            start.record()
        output, kept = attention.forward(query, key, value, bounds)
        attention.backward(output, query, key, value, output, kept, bounds)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / (_TIMED_PASSES - 1)
