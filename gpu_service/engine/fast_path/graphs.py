"""Which passes of a training are recorded and played again, rather than launched kernel by kernel.

Where kernels are small the device waits for the host, which hands them out one by one. A pass of a size that came
before is then recorded over buffers of a fixed size (`frames`), and from then on the passes that fit are copied into
those buffers and played. Only what was measured to be faster is kept. One pass at a time: while one waits for its
backward pass others are made kernel by kernel.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field

import torch

from gpu_service.engine.fast_path.decoder import Decoder, FlatPass
from gpu_service.engine.fast_path.dropout import Dropout
from gpu_service.engine.fast_path.frames import Frame, choose_frame, frame_of
from gpu_service.engine.fast_path.passes import Kind, LaunchedPass, measure
from gpu_service.engine.fast_path.recorded_pass import PlayedPass, Recording
from gpu_service.engine.fast_path.recorder import Recorder, Took

# Beyond it a device is busy with nearly every model, and what a pass holds is much to hold twice.
_LARGEST_TOKENS = 16_384
# Each holds buffers, and takes a few passes' time to make. Of one kind of pass.
_MOST_FRAMES = 16
# Passes of a frame that are made kernel by kernel before it is recorded: what comes once is not worth it.
_SEEN_BEFORE = 1
# Kernels are small where handing them out takes nearly as long as all of a pass.
_DEVICE_MAY_TAKE = 1.15
# A recording that gains less than this part of the time is not worth its memory.
_LEAST_GAIN = 0.1
# Of the memory that is free without them, the part that all recordings may have for themselves.
_MEMORY_PART = 0.5
_TOO_LITTLE_MEMORY = "there is too little free memory for recordings"


@dataclass(kw_only=True)
class _Known:
    """What is known of passes of one kind: recordings by frame, how often a frame came, and what is too large."""

    recordings: dict[Frame, Recording] = field(default_factory=dict)
    seen: Counter[Frame] = field(default_factory=Counter)
    largest_tokens: int = _LARGEST_TOKENS


class PassRecordings:
    """The recordings of one model. `take_notices` says what was decided, for people."""

    def __init__(self, *, decoder: Decoder, dropout: Dropout, num_weights: int, recorder: Recorder) -> None:
        """`num_weights` is the size of the flat buffer."""
        self._decoder, self._dropout = decoder, dropout
        self._num_weights = num_weights
        self._recorder = recorder
        # One for all recordings, since they are played one at a time; made with the first.
        self._gradients = decoder.embedding.new_empty(0)
        self._known = {kind: _Known() for kind in Kind}
        self._lent: weakref.ref[PlayedPass] | None = None
        self._notices: list[str] = []

    @property
    def num_recorded(self) -> int:
        return sum(len(known.recordings) for known in self._known.values())

    def take_notices(self) -> list[str]:
        """What was decided since the last time, oldest first."""
        notices, self._notices = self._notices, []
        return notices

    def lend(self, flat: FlatPass, kind: Kind) -> PlayedPass | None:
        """A recording for this pass; None where it is to be made kernel by kernel.

        The rotary tables of `flat` are at least as long as `frame_of` its sizes. Raises torch.OutOfMemoryError where
        the pass itself has no room.
        """
        lengths, num_targets = flat.bounds.layout.lengths, len(flat.targets)
        known = self._known[kind]
        if sum(lengths) > known.largest_tokens or (self._lent is not None and self._lent() is not None):
            # What a pass that was lent keeps for its way back lies where all recordings have their memory.
            return None
        if kind is Kind.TRAINED and flat.key is None and self._dropout.probability:
            # Recorded with its masks, a pass has them always.
            return None
        if torch.are_deterministic_algorithms_enabled():
            # A clock decides what is played, and a pass that is filled up may be rounded otherwise.
            return None
        frame = choose_frame(known.recordings, lengths, num_targets)
        if frame is None:
            frame = frame_of(lengths, num_targets)
            known.seen[frame] += 1
            is_once = known.seen[frame] <= _SEEN_BEFORE or len(known.recordings) >= _MOST_FRAMES
            if is_once or frame.tokens > known.largest_tokens or not self._make(frame, flat, kind):
                return None
        played = PlayedPass(known.recordings[frame], flat)
        if kind is Kind.TRAINED:
            self._lent = weakref.ref(played)
        return played

    def _make(self, frame: Frame, flat: FlatPass, kind: Kind) -> bool:
        """Record the frame if that is worth it; whether it was."""
        took, taken_bytes = self._time_launched(flat, kind)
        if took.whole > _DEVICE_MAY_TAKE * took.handing_out:
            self._stop_at(frame, kind, f"the device is busy for all of their {1000 * took.whole:.1f} ms")
            return False
        # They are never played beside each other, so that one works in what another has worked in.
        limit_bytes = _MEMORY_PART * (self._recorder.free_bytes() + self._recorder.held_bytes())
        if taken_bytes > limit_bytes:
            self._stop_at(frame, kind, _TOO_LITTLE_MEMORY)
            return False
        try:
            if not len(self._gradients):
                self._gradients = self._gradients.new_empty(self._num_weights)
            recording = Recording(frame, kind, self._decoder, self._dropout, flat, self._gradients)
            recording.put(flat)
            recording.play()
        except torch.OutOfMemoryError as error:
            # The pass itself was made just before: it has room, if only without the buffers.
            self._stop_at(frame, kind, f"there is no memory to record them: {error}")
            return False
        try:
            recording.record(self._recorder)
            # A driver may want memory of its own at the first play.
            played = min((self._recorder.time(recording.play) for _ in range(3)), key=lambda one: one.whole)
        except RuntimeError as error:
            # A library that cannot be recorded, or no memory: what is launched one by one needs neither.
            self._stop_at(frame, kind, f"recording them failed: {error}")
            return False
        if self._recorder.held_bytes() > limit_bytes:
            # The frame is larger than the pass, and a pool has gaps of its own.
            self._stop_at(frame, kind, _TOO_LITTLE_MEMORY)
            return False
        if played.whole > (1 - _LEAST_GAIN) * took.whole:
            self._stop_at(
                frame, kind, f"played again they take {1000 * played.whole:.1f} of {1000 * took.whole:.1f} ms"
            )
            return False
        self._known[kind].recordings[frame] = recording
        self._notices.append(
            f"{kind.value} of up to {frame.tokens} tokens, {frame.targets} of them targets, are played as recorded "
            f"(CUDA graphs): "
            f"{1000 * played.whole:.1f} ms in place of {1000 * took.whole:.1f} ms"
        )
        return True

    def _time_launched(self, flat: FlatPass, kind: Kind) -> tuple[Took, int]:
        """The faster of two, and the bytes that the pass takes at its highest moment."""

        def launch() -> None:
            if kind is not Kind.TRAINED:
                measure(self._decoder, self._dropout, flat, kind)
                return
            launched = LaunchedPass(self._decoder, self._dropout, flat, self._num_weights)
            launched.backward(torch.ones_like(launched.forward()))

        taken_bytes = self._recorder.taken_bytes(launch)
        return min((self._recorder.time(launch) for _ in range(2)), key=lambda one: one.whole), taken_bytes

    def _stop_at(self, frame: Frame, kind: Kind, reason: str) -> None:
        """Larger passes have larger kernels: what is not worth it here is not worth it there."""
        self._known[kind].largest_tokens = frame.tokens - 1
        self._notices.append(f"{kind.value} of {frame.tokens} tokens and more stay launched kernel by kernel: {reason}")
