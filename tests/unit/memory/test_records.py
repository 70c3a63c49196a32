"""What a node keeps of its measurements."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpu_service.domain.device import Device
from gpu_service.domain.memory_calibration import MAX_KINDS, VERSION
from gpu_service.runs.memory_records import MemoryRecords
from tests.fakes.checked_specs import hyper, plan
from tests.unit.memory.shapes import H100, make_base
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


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 2}', '{"version": 3, "kinds": {"a": [[0, 0]]}}'])
async def test_a_damaged_file_is_begun_anew(tmp_path: Path, content: str) -> None:
    path = tmp_path / "memory.json"
    path.write_text(content)
    records = MemoryRecords(path)
    await records.observe("a", analytic_bytes=1, peak_bytes=2)
    assert MemoryRecords(path).of_kind("a") == {"a": [[1, 2]]}


async def test_measurements_that_meant_something_else_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    path.write_text(json.dumps({"version": VERSION - 1, "kinds": {"a": [[1000, 1100]]}}))
    assert MemoryRecords(path).all() == {}


def _plan(training_type: str = "qlora", device: Device = H100, **values: Any) -> Any:
    base = make_base(hidden=3072, intermediate=8192, layers=28, heads=24, key_value_heads=8)
    spec = hyper(batch={"tokens": 8192}, max_length=2048, **values) | {"training_type": training_type}
    return plan(spec, replace(base, max_position_embeddings=32768, has_chat_template=True), device)


def test_runs_that_hold_or_multiply_their_base_otherwise_are_of_another_kind() -> None:
    ways: tuple[dict[str, Any], ...] = (
        {},
        {"base_weights": "resident"},
        {"base_weights": "streamed"},
        {"compute": "fp8"},
        {"trainer": "reference"},
    )
    assert len({_plan(**values).kind_of_run for values in ways}) == len(ways)
    assert _plan().kind_of_run == _plan(base_weights="auto", compute="standard").kind_of_run
    # What a plan chooses itself is not what tells them apart: it follows from the data.
    large, small = _plan(), _plan(device=replace(H100, total_memory_bytes=20 << 30))
    assert small.hyperparameters.base_weights != large.hyperparameters.base_weights
    assert small.kind_of_run == large.kind_of_run


def test_version_rises_when_arithmetic_says_something_else() -> None:
    """Each of these runs has measurements on somebody's node, under these numbers."""
    ways: dict[str, Any] = {
        "resident": _plan(base_weights="resident"),
        "streamed": _plan(base_weights="streamed"),
        "fp8": _plan(compute="fp8"),
        "whole": _plan(gradient_checkpointing=True),
        "offloaded": _plan(recomputation={"offload": True}),
        "sliced": _plan(recomputation={"offload": True, "feed_forward_slices": 4}),
        "lora": _plan("lora"),
        "reference": _plan(trainer="reference"),
        "reference-lora": _plan("lora", trainer="reference"),
        "reference-full": _plan("full", trainer="reference", gradient_checkpointing=True),
        "cpu": _plan(device=Device()),
    }
    assert (VERSION, {name: made.memory.analytic_bytes for name, made in ways.items()}) == (
        4,
        {
            "resident": 30_020_212_736,
            "streamed": 24_485_312_512,
            "fp8": 30_215_182_336,
            "whole": 5_205_211_136,
            "offloaded": 3_896_588_288,
            "sliced": 3_505_395_712,
            "lora": 28_565_395_456,
            "reference": 61_428_822_016,
            "reference-lora": 52_705_974_272,
            "reference-full": 64_322_105_344,
            "cpu": 72_467_312_640,
        },
    ), "raise domain.memory_calibration.VERSION, then change the numbers here"
