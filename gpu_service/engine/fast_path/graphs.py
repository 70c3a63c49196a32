"""How the passes of a training are made: kernel by kernel, or as recordings that one launch each plays again.

Where kernels are small the device waits for the host, which hands them out one by one. A pass of a size that came
before is then recorded, forward and backward, over buffers of a fixed size (`frames`), and from then on the passes that
fit are copied into those buffers and played. What fills them up is a sequence of its own that nothing sees, and its
gradient is zero; results are those of launched kernels, up to the rounding of products of another height. Only what was
measured to be faster is kept. One pass at a time: while one waits for its backward pass others are made kernel by
kernel. Passes whose inputs wait in host memory are never recorded.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch

from gpu_service.engine.fast_path.attention import Bounds
from gpu_service.engine.fast_path.block import Positions
from gpu_service.engine.fast_path.decoder import Decoder, FlatPass, KeptPass
from gpu_service.engine.fast_path.dropout import Dropout
from gpu_service.engine.fast_path.frames import Frame, choose_frame, frame_of
from gpu_service.engine.training.flat_attention import FlatLayout

# Beyond it a device is busy with every model that fills it at all.
_LARGEST_TOKENS = 8192
# Each holds buffers, and takes a few passes' time to make.
_MOST_FRAMES = 16
# Passes of a frame that are made kernel by kernel before it is recorded: what comes once is not worth it.
_SEEN_BEFORE = 1
# Kernels are small where handing them out takes nearly as long as all of a pass.
_DEVICE_MAY_TAKE = 1.15
# A recording that gains less than this part of the time is not worth its memory.
_LEAST_GAIN = 0.1
# Of the memory that is free, the part that recordings may take.
_MEMORY_PART = 0.5


@dataclass(frozen=True, kw_only=True)
class Took:
    """Seconds until the host had handed everything out, and until it was done."""

    handing_out: float
    whole: float


class Recorder(Protocol):
    """Records what is launched, and measures it."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What plays `work`'s kernels again. `work` was run before, so that nothing of it is compiled now."""
        ...

    def time(self, work: Callable[[], None]) -> Took:
        """Run `work` alone on the device, and wait for its end."""
        ...

    def used_bytes(self) -> int:
        """Device memory in use."""
        ...

    def free_bytes(self) -> int:
        """Device memory that nobody holds."""
        ...


class CudaRecorder:
    """CUDA graphs, which share one pool of memory: they never run beside each other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # What cuBLAS works in would otherwise be memory that is given to others when it is given back.
        _drop_workspaces()
        # Other threads of the engine go on; theirs is not recorded.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        _drop_workspaces()
        return graph.replay

    def time(self, work: Callable[[], None]) -> Took:
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        work()
        handed_out = time.perf_counter()
        torch.cuda.synchronize(self._device)
        return Took(handing_out=handed_out - start, whole=time.perf_counter() - start)

    def used_bytes(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def free_bytes(self) -> int:
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return torch.cuda.mem_get_info(self._device)[0] + cached


def _drop_workspaces() -> None:
    # Without a public name in torch, which does the same around graphs of its own.
    clear: Any = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()


class Pass(Protocol):
    """One pass, forward and then back, each once."""

    def forward(self) -> torch.Tensor:
        """Nats of each target, float32 [K]; valid until the next pass."""
        ...

    def backward(self, upstream: torch.Tensor) -> torch.Tensor:
        """The gradient of the flat buffer, float32; `upstream` [K] is that of the nats."""
        ...


class LaunchedPass:
    """Kernel by kernel."""

    def __init__(self, decoder: Decoder, dropout: Dropout, flat: FlatPass, num_weights: int) -> None:
        """`num_weights` is the size of the flat buffer."""
        self._decoder, self._dropout, self._flat = decoder, dropout, flat
        self._num_weights = num_weights
        self._kept: KeptPass | None = None

    def forward(self) -> torch.Tensor:
        self._dropout.key = self._flat.key
        nats, self._kept = self._decoder.forward(self._flat, adapted=True, keeps=True)
        return nats

    def backward(self, upstream: torch.Tensor) -> torch.Tensor:
        gradients = self._decoder.embedding.new_empty(self._num_weights)
        self.write_gradients(upstream, gradients)
        return gradients.float()

    def write_gradients(self, upstream: torch.Tensor, gradients: torch.Tensor) -> None:
        """`backward` into a buffer in the compute type."""
        kept, self._kept = self._kept, None
        assert kept is not None
        self._dropout.key = self._flat.key
        self._decoder.backward(upstream, self._flat, kept, gradients)


class _Recording:
    """A frame's buffers, and the pass over them as it was recorded."""

    def __init__(
        self, frame: Frame, decoder: Decoder, dropout: Dropout, like: FlatPass, gradients: torch.Tensor
    ) -> None:
        device = like.tokens.device

        def buffer(size: int, kind: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(size, dtype=kind, device=device)

        self._frame = frame
        self._tokens, self._places = buffer(frame.tokens), buffer(frame.tokens)
        self._fill_places = torch.arange(frame.tokens, device=device) % frame.longest
        self._starts = buffer(frame.sequences + 1, torch.int32)
        self._targets, self._labels = buffer(frame.targets), buffer(frame.targets)
        self._key = None if like.key is None else like.key.clone()
        self._nats, self._upstream = buffer(frame.targets, torch.float32), buffer(frame.targets, torch.float32)
        self._gradients = gradients
        # Holds the rotary tables too: longer ones may take the model's place for them, with the same beginning.
        self._positions = Positions(cosines=like.positions.cosines, sines=like.positions.sines, places=self._places)
        self._decoder, self._dropout = decoder, dropout
        self._launched: LaunchedPass | None = None
        self.play_forward: Callable[[], None] = self._launch_forward
        self.play_backward: Callable[[], None] = self._launch_backward

    def put(self, flat: FlatPass) -> None:
        """Copy a pass that the frame holds into the buffers; the host waits for nothing."""
        frame, lengths = self._frame, flat.bounds.layout.lengths
        tokens, targets = len(flat.tokens), len(flat.targets)
        filled = frame.fill(lengths)
        self._tokens[:tokens].copy_(flat.tokens)
        self._places[:tokens].copy_(flat.positions.places)
        if tokens < frame.tokens:
            # Tokens that a pass has anyway: their numbers are as good as its own.
            self._tokens[tokens:].copy_(flat.tokens[:1].expand(frame.tokens - tokens))
            self._places[tokens:].copy_(self._fill_places[: frame.tokens - tokens])
        starts = [0, *accumulate(filled)]
        starts += [frame.tokens] * (frame.sequences + 1 - len(starts))
        self._starts.copy_(_pin(torch.tensor(starts, dtype=torch.int32), self._starts), non_blocking=True)
        self._targets[:targets].copy_(flat.targets)
        self._labels[:targets].copy_(flat.labels)
        if targets < frame.targets:
            # The last row of a pass never carries loss: nothing follows it.
            self._targets[targets:].fill_(frame.tokens - 1)
            self._labels[targets:].zero_()
        if self._key is not None and flat.key is not None:
            self._key.copy_(flat.key)
        bounds = Bounds(
            starts=self._starts, longest=frame.longest, layout=FlatLayout(lengths=filled), lengths_vary=True
        )
        self._flat = FlatPass(
            tokens=self._tokens,
            positions=self._positions,
            bounds=bounds,
            targets=self._targets,
            labels=self._labels,
            sequences=flat.sequences,
            targets_by_sequence=flat.targets_by_sequence,
            key=self._key,
        )

    def record(self, recorder: Recorder) -> None:
        """The buffers hold a pass. What a forward pass keeps stays where the backward one was recorded to find it."""
        self._launch_forward()
        self._launch_backward()
        self.play_forward = recorder.record(self._launch_forward)
        self.play_backward = recorder.record(self._launch_backward)

    def read_nats(self, num_targets: int) -> torch.Tensor:
        return self._nats[:num_targets]

    def put_upstream(self, upstream: torch.Tensor) -> None:
        self._upstream[: len(upstream)].copy_(upstream)
        self._upstream[len(upstream) :].zero_()

    def read_gradients(self) -> torch.Tensor:
        return self._gradients.to(torch.float32, copy=True)

    def _launch_forward(self) -> None:
        self._launched = LaunchedPass(self._decoder, self._dropout, self._flat, len(self._gradients))
        self._nats.copy_(self._launched.forward())

    def _launch_backward(self) -> None:
        launched, self._launched = self._launched, None
        assert launched is not None
        launched.write_gradients(self._upstream, self._gradients)


class PlayedPass:
    """A recording, lent to one pass."""

    def __init__(self, recording: _Recording, flat: FlatPass) -> None:
        self._recording, self._flat = recording, flat

    def forward(self) -> torch.Tensor:
        self._recording.put(self._flat)
        self._recording.play_forward()
        return self._recording.read_nats(len(self._flat.targets))

    def backward(self, upstream: torch.Tensor) -> torch.Tensor:
        self._recording.put_upstream(upstream)
        self._recording.play_backward()
        return self._recording.read_gradients()


class PassRecordings:
    """The recordings of one model. `take_notices` says what was decided, for people."""

    def __init__(self, *, decoder: Decoder, dropout: Dropout, num_weights: int, recorder: Recorder) -> None:
        """`num_weights` is the size of the flat buffer."""
        self._decoder, self._dropout = decoder, dropout
        self._num_weights = num_weights
        self._recorder = recorder
        # One for all recordings, since they are played one at a time; made with the first.
        self._gradients = decoder.embedding.new_empty(0)
        self._recordings: dict[Frame, _Recording] = {}
        self._seen: Counter[Frame] = Counter()
        self._largest_tokens = _LARGEST_TOKENS
        self._lent: weakref.ref[PlayedPass] | None = None
        self._notices: list[str] = []

    @property
    def num_recorded(self) -> int:
        return len(self._recordings)

    def take_notices(self) -> list[str]:
        """What was decided since the last time, oldest first."""
        notices, self._notices = self._notices, []
        return notices

    def lend(self, flat: FlatPass) -> PlayedPass | None:
        """A recording for this pass; None where it is to be made kernel by kernel.

        The rotary tables of `flat` are at least as long as `frame_of` its sizes. Raises torch.OutOfMemoryError where
        the pass itself has no room.
        """
        lengths, num_targets = flat.bounds.layout.lengths, len(flat.targets)
        if sum(lengths) > self._largest_tokens or (self._lent is not None and self._lent() is not None):
            return None
        if flat.key is None and self._dropout.probability:
            # Recorded with its masks, a pass has them always.
            return None
        frame = choose_frame(self._recordings, lengths, num_targets)
        if frame is None:
            frame = frame_of(lengths, num_targets)
            self._seen[frame] += 1
            is_once = self._seen[frame] <= _SEEN_BEFORE or len(self._recordings) >= _MOST_FRAMES
            if is_once or frame.tokens > self._largest_tokens or not self._make(frame, flat):
                return None
        played = PlayedPass(self._recordings[frame], flat)
        self._lent = weakref.ref(played)
        return played

    def _make(self, frame: Frame, flat: FlatPass) -> bool:
        """Record the frame if that is worth it; whether it was."""
        held_bytes = 0

        def launch() -> None:
            nonlocal held_bytes
            before = self._recorder.used_bytes()
            launched = LaunchedPass(self._decoder, self._dropout, flat, self._num_weights)
            upstream = torch.ones_like(launched.forward())
            held_bytes = self._recorder.used_bytes() - before
            launched.backward(upstream)

        took = min((self._recorder.time(launch) for _ in range(2)), key=lambda one: one.whole)
        if took.whole > _DEVICE_MAY_TAKE * took.handing_out:
            self._stop_at(frame, f"the device is busy for all of their {1000 * took.whole:.1f} ms")
            return False
        if held_bytes > _MEMORY_PART * self._recorder.free_bytes():
            self._stop_at(frame, "there is too little free memory for recordings")
            return False
        if not len(self._gradients):
            self._gradients = self._gradients.new_empty(self._num_weights)
        recording = _Recording(frame, self._decoder, self._dropout, flat, self._gradients)

        def play() -> None:
            recording.play_forward()
            recording.play_backward()

        try:
            recording.put(flat)
            recording.record(self._recorder)
            played = min((self._recorder.time(play) for _ in range(3)), key=lambda one: one.whole)
        except RuntimeError as error:
            # A library that cannot be recorded, or no memory: what is launched one by one needs neither.
            self._stop_at(frame, f"recording them failed: {error}")
            return False
        if played.whole > (1 - _LEAST_GAIN) * took.whole:
            self._stop_at(frame, f"played again they take {1000 * played.whole:.1f} of {1000 * took.whole:.1f} ms")
            return False
        self._recordings[frame] = recording
        self._notices.append(
            f"passes of up to {frame.tokens} tokens are played as recorded (CUDA graphs): "
            f"{1000 * played.whole:.1f} ms in place of {1000 * took.whole:.1f} ms"
        )
        return True

    def _stop_at(self, frame: Frame, reason: str) -> None:
        """Larger passes have larger kernels: what is not worth it here is not worth it there."""
        self._largest_tokens = frame.tokens - 1
        self._notices.append(f"passes of {frame.tokens} tokens and more stay launched kernel by kernel: {reason}")


def _pin(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return tensor.pin_memory() if like.is_cuda else tensor
