"""A pass as it was recorded, over buffers of a frame's size, and what puts other passes into those buffers.

What fills a frame up is a sequence of its own that nothing sees, and its gradient is zero: results are those of
launched kernels, up to the rounding of products of another height.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch

from gpu_service.engine.fast_path.attention import Bounds
from gpu_service.engine.fast_path.block import Positions
from gpu_service.engine.fast_path.decoder import Decoder, FlatPass
from gpu_service.engine.fast_path.dropout import Dropout
from gpu_service.engine.fast_path.frames import Frame
from gpu_service.engine.fast_path.passes import Kind, LaunchedPass, measure
from gpu_service.engine.fast_path.recorder import Recorder
from gpu_service.engine.training.flat_attention import FlatLayout


class Recording:
    """A frame's buffers, and the pass over them as it was recorded."""

    def __init__(
        self, frame: Frame, kind: Kind, decoder: Decoder, dropout: Dropout, like: FlatPass, gradients: torch.Tensor
    ) -> None:
        device = like.tokens.device

        def buffer(size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self._frame, self._kind = frame, kind
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
        # What plays either; None: it is launched. Never this object's own methods, which would hold it, and all its
        # memory, in a cycle until somebody collects those.
        self._play_forward: Callable[[], None] | None = None
        self._play_backward: Callable[[], None] | None = None

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
            starts=self._starts,
            longest=frame.longest,
            layout=FlatLayout(lengths=filled),
            lengths_vary=not frame.is_even,
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
        """The buffers hold a pass that was made. What a forward pass keeps stays where the backward one was recorded to
        find it.
        """
        self._play_forward = recorder.record(self._launch_forward)
        if self._kind is Kind.TRAINED:
            self._play_backward = recorder.record(self._launch_backward)

    def play(self) -> None:
        """All of a pass."""
        self.play_forward()
        if self._kind is Kind.TRAINED:
            self.play_backward()

    def play_forward(self) -> None:
        (self._play_forward or self._launch_forward)()

    def play_backward(self) -> None:
        (self._play_backward or self._launch_backward)()

    def read_nats(self, num_targets: int) -> torch.Tensor:
        return self._nats[:num_targets]

    def put_upstream(self, upstream: torch.Tensor) -> None:
        self._upstream[: len(upstream)].copy_(upstream)
        self._upstream[len(upstream) :].zero_()

    def read_gradients(self) -> torch.Tensor:
        return self._gradients.to(torch.float32, copy=True)

    def _launch_forward(self) -> None:
        if self._kind is not Kind.TRAINED:
            self._nats.copy_(measure(self._decoder, self._dropout, self._flat, self._kind))
            return
        self._launched = LaunchedPass(self._decoder, self._dropout, self._flat, len(self._gradients))
        self._nats.copy_(self._launched.forward())

    def _launch_backward(self) -> None:
        launched, self._launched = self._launched, None
        assert launched is not None
        launched.write_gradients(self._upstream, self._gradients)


class PlayedPass:
    """A recording, lent to one pass."""

    def __init__(self, recording: Recording, flat: FlatPass) -> None:
        self._recording, self._flat = recording, flat

    def forward(self) -> torch.Tensor:
        self._recording.put(self._flat)
        self._recording.play_forward()
        return self._recording.read_nats(len(self._flat.targets))

    def backward(self, upstream: torch.Tensor) -> torch.Tensor:
        self._recording.put_upstream(upstream)
        self._recording.play_backward()
        return self._recording.read_gradients()


def _pin(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return tensor.pin_memory() if like.is_cuda else tensor
