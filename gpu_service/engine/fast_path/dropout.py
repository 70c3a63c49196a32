"""Dropout of adapters as PEFT has it: of what each layer's A reads, by a mask of its own. Masks are never stored.

Whether a number is kept follows from the pass' key, the layer, row and column alone, so that the backward pass, or a
block that is recomputed, finds the same mask again. Keys are drawn from torch's generator of the host, whose state
every checkpoint holds. The functions here are what the kernels (`dropout_kernels`) compute, and what a CPU runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import torch

# Layers that read the same rows; a layer's number is its group's times this, and its place there.
LAYERS_PER_GROUP = 4
_WORD = 0xFFFFFFFF
_LARGEST_KEY = 2**62


@dataclass(kw_only=True)
class Dropout:
    """What all adapters of a model share. `key` is the pass' own, int64 [1] on the device; None: nothing is dropped.

    `first_row` is the place in the pass of the first of the rows at hand.
    """

    probability: float
    device: torch.device
    key: torch.Tensor | None = None
    first_row: int = 0

    def draw_key(self) -> torch.Tensor | None:
        """A key for the next pass; None where nothing is ever dropped, and no random number is spent."""
        if not self.probability:
            return None
        key = torch.randint(_LARGEST_KEY, (1,))
        return key if self.device.type != "cuda" else key.pin_memory().to(self.device, non_blocking=True)

    @contextmanager
    def starting_at(self, first_row: int) -> Iterator[None]:
        """Inside, rows at hand are those of the pass from `first_row` on."""
        self.first_row = first_row
        try:
            yield
        finally:
            self.first_row = 0

    @property
    def is_active(self) -> bool:
        return self.key is not None

    @cached_property
    def kernels(self) -> Any:
        """The module that has `drop_and_rank`, `drop_and_weigh` and `drop_and_add` for the device."""
        name = "dropout_kernels" if self.device.type == "cuda" else "dropout"
        return import_module(f"gpu_service.engine.fast_path.{name}")


def threshold(probability: float) -> int:
    """Words below it are dropped."""
    return round(probability * 2**32)


def keep_mask(
    key: torch.Tensor, layer: int, rows: int, columns: int, probability: float, first_row: int = 0
) -> torch.Tensor:
    """What a layer keeps of its rows, the first of which is the pass' `first_row`: bool [rows, columns]."""
    low, high = key & _WORD, (key >> 32) & _WORD
    start = mix(low ^ mix((high + layer * 0x9E3779B9) & _WORD))
    row = torch.arange(first_row, first_row + rows, device=key.device)[:, None]
    column = torch.arange(columns, device=key.device)[None]
    of_row = mix(start ^ ((row * 0x85EBCA77) & _WORD))
    return mix(of_row ^ ((column * 0xC2B2AE3D) & _WORD)) >= threshold(probability)


def mix(word: torch.Tensor) -> torch.Tensor:
    """A permutation of 32-bit words whose every bit depends on every bit, in int64."""
    word = word ^ (word >> 16)
    word = (word * 0x7FEB352D) & _WORD
    word = word ^ (word >> 15)
    word = (word * 0x846CA68B) & _WORD
    return word ^ (word >> 16)


def drop_and_rank(
    rows: torch.Tensor,
    below: torch.Tensor,
    out: torch.Tensor,
    key: torch.Tensor,
    *,
    first_row: int,
    first_layer: int,
    num_layers: int,
    rank: int,
    probability: float,
) -> None:
    """`out` [T, room] becomes each layer's dropped `rows` [T, K] times its part of `below` [room, K], and else zero.

    `first_row` is the place of the first of the rows in the pass, which their masks follow.
    """
    out.zero_()
    for number, ranks in _each(num_layers, rank):
        dropped = _drop(rows, key, first_layer + number, probability, first_row)
        out[:, ranks].copy_(dropped @ below[ranks].float().t())


def drop_and_weigh(
    inner: torch.Tensor,
    rows: torch.Tensor,
    out: torch.Tensor,
    key: torch.Tensor,
    *,
    first_row: int,
    first_layer: int,
    num_layers: int,
    rank: int,
    probability: float,
) -> None:
    """`out` [layers * rank, K] becomes A's gradients: `inner` [T, room] transposed times each layer's dropped rows."""
    for number, ranks in _each(num_layers, rank):
        dropped = _drop(rows, key, first_layer + number, probability, first_row)
        out[ranks].copy_(inner[:, ranks].float().t() @ dropped)


def drop_and_add(
    inner: torch.Tensor,
    below: torch.Tensor,
    out: torch.Tensor,
    key: torch.Tensor,
    *,
    first_row: int,
    first_layer: int,
    num_layers: int,
    rank: int,
    probability: float,
) -> None:
    """The rows' gradient `out` [T, K] gets what comes through the adapters: `inner` times A, where rows were kept."""
    total = out.float()
    for number, ranks in _each(num_layers, rank):
        through = inner[:, ranks].float() @ below[ranks].float()
        total += _drop(through, key, first_layer + number, probability, first_row)
    out.copy_(total)


def _drop(rows: torch.Tensor, key: torch.Tensor, layer: int, probability: float, first_row: int) -> torch.Tensor:
    kept = keep_mask(key, layer, rows.shape[0], rows.shape[1], probability, first_row)
    return rows.float() * kept / (1 - probability)


def _each(num_layers: int, rank: int) -> list[tuple[int, slice]]:
    return [(number, slice(number * rank, (number + 1) * rank)) for number in range(num_layers)]
