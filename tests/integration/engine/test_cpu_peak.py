"""The peak of a run on a CPU: the process' highest resident set since counting began, whenever that was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gpu_service.engine import devices
from gpu_service.engine.request import DeviceChoice

_MIB = 1024**2
_PIECE_BYTES = 192 * _MIB


def _touch() -> None:
    """Memory that is in use for a moment, and gone when anybody looks."""
    torch.ones(_PIECE_BYTES, dtype=torch.uint8)


def test_the_highest_moment_counts_though_nobody_looked() -> None:
    device = devices.select(DeviceChoice(type="cpu", index=-1))
    device.start_counting()
    before = device.used_bytes()
    _touch()
    assert device.used_bytes() < before + _PIECE_BYTES // 2
    assert device.peak_bytes() > before + _PIECE_BYTES * 9 // 10
    # What came before is forgotten when counting begins anew.
    device.start_counting()
    assert device.peak_bytes() < before + _PIECE_BYTES // 2


def test_where_the_kernel_does_not_count_what_was_seen_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(devices, "_CLEAR_REFERENCES", tmp_path / "nowhere" / "clear_refs")
    device = devices.select(DeviceChoice(type="cpu", index=-1))
    _touch()
    device.start_counting()
    before = device.used_bytes()
    _touch()
    assert device.peak_bytes() < before + _PIECE_BYTES // 2
    kept = torch.ones(_PIECE_BYTES, dtype=torch.uint8)
    device.used_bytes()
    del kept
    assert device.peak_bytes() > before + _PIECE_BYTES * 9 // 10


def test_what_was_freed_before_is_given_back_first() -> None:
    """Blocks of a heap stay with the process until it is told to give them back."""
    device = devices.select(DeviceChoice(type="cpu", index=-1))
    device.start_counting()
    before = device.used_bytes()
    pieces = [torch.ones(64 * 1024, dtype=torch.uint8) for _ in range(2048)]
    # One that stays keeps the heap from shrinking by itself.
    last = pieces[-1]
    pieces.clear()
    device.start_counting()
    assert device.used_bytes() < before + 64 * _MIB
    assert last[0] == 1
