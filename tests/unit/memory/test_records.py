"""What a node keeps of its measurements."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpu_service.domain.memory_calibration import MAX_KINDS
from gpu_service.runs.memory_records import MemoryRecords
from tunesmith.common.v1 import event_pb2


def _run(state: str, **measured: int) -> Any:
    summary = SimpleNamespace(
        state=event_pb2.RunState.Value(f"RUN_STATE_{state}"),
        memory_measured=event_pb2.MemoryMeasuredEvent(**measured) if measured else None,
    )
    return SimpleNamespace(content={"kind_of_run": "lora/none"}, summary=summary)


async def test_measurements_outlive_the_server(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    records = MemoryRecords(path)
    assert records.of_kind("lora/none") == {}
    await records.learn(_run("SUCCEEDED", analytic_bytes=1000, peak_bytes=1100, predicted_bytes=1000))
    assert MemoryRecords(path).of_kind("lora/none") == {"lora/none": [[1000, 1100]]}
    assert MemoryRecords(path).all()["lora/none"].scale(2000) == 2200


async def test_runs_that_tell_nothing_are_passed_over(tmp_path: Path) -> None:
    records = MemoryRecords(tmp_path / "memory.json")
    await records.learn(_run("CANCELLED", analytic_bytes=1000, peak_bytes=10))
    await records.learn(_run("SUCCEEDED", analytic_bytes=0, peak_bytes=1100))
    await records.learn(_run("SUCCEEDED"))
    assert not (tmp_path / "memory.json").exists()


async def test_kinds_are_bounded(tmp_path: Path) -> None:
    records = MemoryRecords(tmp_path / "memory.json")
    for number in range(MAX_KINDS + 3):
        await records.observe(f"kind {number}", analytic_bytes=1000, peak_bytes=1000)
    kinds = json.loads((tmp_path / "memory.json").read_text())["kinds"]
    assert len(kinds) == MAX_KINDS
    assert "kind 0" not in kinds
    assert f"kind {MAX_KINDS + 2}" in kinds


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}', '{"version": 1, "kinds": {"a": [[0, 0]]}}'])
async def test_a_damaged_file_is_begun_anew(tmp_path: Path, content: str) -> None:
    path = tmp_path / "memory.json"
    path.write_text(content)
    records = MemoryRecords(path)
    await records.observe("a", analytic_bytes=1, peak_bytes=2)
    assert MemoryRecords(path).of_kind("a") == {"a": [[1, 2]]}
