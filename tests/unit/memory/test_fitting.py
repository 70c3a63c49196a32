"""What a fast run's plan chooses so that it fits: the least recomputation, and restored weights where there is room."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpu_service.domain.device import Device
from gpu_service.domain.errors import Refusal
from gpu_service.domain.plan import check_host_fit
from gpu_service.domain.recomputation import (
    ELEMENTWISE,
    FEED_FORWARD,
    FULL,
    HOST_SPARE_BYTES,
    NONE,
    NOTHING,
    Recomputation,
    everything,
    ladder,
    least_memory,
    place_bytes,
    slice_rows,
    step_down,
)
from tests.fakes.checked_specs import CPU, hyper, plan
from tests.unit.memory.shapes import H100, make_base

_3B = make_base(hidden=3072, intermediate=8192, layers=28, heads=24, key_value_heads=8)


def _plan(device: Device = H100, *, base: Any = _3B, spec: dict[str, Any] | None = None, **values: Any) -> Any:
    values = {"batch": {"tokens": 8192}, "max_length": 2048, **values}
    whole = replace(base, max_position_embeddings=32768, has_chat_template=True)
    return plan({**hyper(**values), **(spec or {})}, whole, device)


def _with_memory(gib: float) -> Device:
    return replace(H100, total_memory_bytes=round(gib * 1024**3))


def test_levels_stand_from_the_first_layer_in_the_order_of_what_they_save() -> None:
    mixed = Recomputation(full_layers=1, feed_forward_layers=2, elementwise_layers=1)
    assert mixed.levels(6) == (FULL, FEED_FORWARD, FEED_FORWARD, ELEMENTWISE, NONE, NONE)
    assert everything(3).levels(3) == (FULL,) * 3
    assert NOTHING.levels(2) == (NONE, NONE)


def test_every_rung_takes_less_than_the_one_before() -> None:
    rungs = list(ladder(28, may_slice=True))
    assert rungs[0] == NOTHING
    assert rungs[-2:] == [everything(28, offload=True), least_memory(28)]
    assert rungs[:-1] == list(ladder(28, may_slice=False))
    peaks = [_peak(rung) for rung in (rungs[0], rungs[14], rungs[28], rungs[42], rungs[56], rungs[70], *rungs[-3:])]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < 0.25 * peaks[0]


def _peak(rung: Recomputation) -> int:
    asked = {
        "full_layers": rung.full_layers,
        "feed_forward_layers": rung.feed_forward_layers,
        "elementwise_layers": rung.elementwise_layers,
        "offload": rung.offload,
        "feed_forward_slices": rung.feed_forward_slices,
    }
    peak: int = _plan(recomputation=asked).memory.peak_bytes
    return peak


def test_steps_down_are_the_ladder_s_rungs_for_all_layers() -> None:
    ways = [NOTHING]
    while (following := step_down(ways[-1], 28, may_slice=True)) is not None:
        ways.append(following)
    rungs = list(ladder(28, may_slice=True))
    assert ways == [NOTHING, rungs[28], rungs[56], rungs[84], *rungs[-2:]]
    assert step_down(everything(28, offload=True), 28, may_slice=False) is None
    # What was in slices stays in as many at least.
    assert step_down(everything(28, feed_forward_slices=2), 28, may_slice=True) == everything(
        28, offload=True, feed_forward_slices=2
    )
    assert step_down(everything(28, offload=True, feed_forward_slices=2), 28, may_slice=True) == least_memory(28)
    assert step_down(everything(28, offload=True, feed_forward_slices=9), 28, may_slice=True) is None


@pytest.mark.parametrize(
    ("rows", "slices", "step"),
    [(8192, 1, 8192), (8192, 4, 2048), (8192, 3, 2816), (100, 4, 128), (129, 2, 128), (257, 2, 256), (0, 3, 128)],
)
def test_slices_are_whole_tiles(rows: int, slices: int, step: int) -> None:
    assert slice_rows(rows, slices) == step


def test_slices_need_less_and_no_more_than_the_goal() -> None:
    """Of a 3B shape in one pass of 8,192 tokens."""
    peaks = [
        _plan(recomputation={"offload": True, "feed_forward_slices": slices}).memory.peak_bytes
        for slices in (1, 2, 3, 4)
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < 3.35 * 1024**3


def test_with_room_nothing_is_recomputed_and_weights_stand_restored() -> None:
    checked = _plan()
    resolved = checked.hyperparameters
    assert resolved.recomputation == NOTHING
    assert resolved.base_weights == "resident"
    assert not resolved.gradient_checkpointing
    assert "nothing is recomputed" in checked.memory_reason
    assert "restored once and kept" in checked.memory_reason
    streamed = _plan(base_weights="streamed")
    assert streamed.hyperparameters.base_weights == "streamed"
    more = checked.memory.weights_bytes - streamed.memory.weights_bytes
    assert more == 2 * _3B.num_linear_parameters


def test_least_recomputation_that_fits_is_chosen() -> None:
    chosen = [_plan(_with_memory(gib)).hyperparameters for gib in (79, 26, 22, 15.5, 10, 6.4, 5.5)]
    assert [one.base_weights for one in chosen] == ["resident", *["streamed"] * 6]
    numbers = [one.recomputation for one in chosen]
    assert numbers[0] == numbers[1] == NOTHING
    assert 0 < numbers[2].elementwise_layers < 28
    assert numbers[2].num_layers == numbers[2].elementwise_layers
    assert 0 < numbers[3].feed_forward_layers < 28
    assert 0 < numbers[4].full_layers < 28
    assert numbers[5].full_layers >= 20
    assert not numbers[5].offload
    assert numbers[6] == everything(28, offload=True)
    rungs = list(ladder(28, may_slice=True))
    for gib, rung in zip((22, 15.5, 10), numbers[2:], strict=False):
        before = rungs[rungs.index(rung) - 1]
        asked = {name: getattr(before, name) for name in ("full_layers", "feed_forward_layers", "elementwise_layers")}
        assert _plan(_with_memory(gib), recomputation=asked).memory.total_bytes > gib * 1024**3


def test_what_was_asked_for_is_taken() -> None:
    kept = _plan(_with_memory(12), gradient_checkpointing=False).hyperparameters
    assert kept.recomputation == NOTHING
    whole = _plan(gradient_checkpointing=True).hyperparameters
    assert whole.recomputation == everything(28)
    assert whole.gradient_checkpointing
    # Who saves memory does not want the weights twice.
    assert whole.base_weights == "streamed"
    assert _plan(gradient_checkpointing=True, base_weights="resident").hyperparameters.base_weights == "resident"
    least = _plan(recomputation={"offload": True}).hyperparameters
    assert least.recomputation == everything(28, offload=True)
    some = _plan(recomputation={"full_layers": 3}).hyperparameters
    assert some.recomputation == Recomputation(full_layers=3)
    sliced = _plan(recomputation={"feed_forward_slices": 3})
    assert sliced.hyperparameters.recomputation == everything(28, feed_forward_slices=3)
    assert "their feed-forward half in 3 slices" in sliced.memory_reason
    assert sliced.hyperparameters.to_json()["recomputation"]["feed_forward_slices"] == 3
    asked: dict[str, Any] = {"full_layers": 5, "feed_forward_layers": 1, "feed_forward_slices": 2, "offload": True}
    assert _plan(recomputation=asked).hyperparameters.recomputation == Recomputation(**asked)
    whole = _plan(gradient_checkpointing=True, recomputation={"feed_forward_slices": 2}).hyperparameters
    assert whole.recomputation == everything(28, feed_forward_slices=2)
    assert not some.gradient_checkpointing


def test_plain_weights_have_no_second_form() -> None:
    resolved = _plan(spec={"training_type": "lora"}).hyperparameters
    assert resolved.trainer == "fast"
    assert resolved.base_weights is None


def test_plain_path_has_none_of_it() -> None:
    checked = _plan(trainer="reference")
    assert checked.hyperparameters.recomputation is None
    assert checked.hyperparameters.base_weights is None
    assert checked.memory_reason == ""
    assert "recomputation" not in checked.hyperparameters.to_json()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"trainer": "reference", "recomputation": {"full_layers": 1}}, "COMBINATION_NOT_ALLOWED"),
        ({"trainer": "reference", "base_weights": "resident"}, "COMBINATION_NOT_ALLOWED"),
        ({"quantization": {"method": "fp4"}, "recomputation": {"offload": True}}, "COMBINATION_NOT_ALLOWED"),
        ({"gradient_checkpointing": True, "recomputation": {"full_layers": 1}}, "COMBINATION_NOT_ALLOWED"),
        ({"recomputation": {"full_layers": 20, "elementwise_layers": 9}}, "INVALID_FIELD"),
        ({"recomputation": {"feed_forward_layers": 3, "feed_forward_slices": 2}}, "COMBINATION_NOT_ALLOWED"),
        ({"recomputation": {"full_layers": 0, "feed_forward_slices": 2}}, "COMBINATION_NOT_ALLOWED"),
        ({"gradient_checkpointing": False, "recomputation": {"feed_forward_slices": 2}}, "COMBINATION_NOT_ALLOWED"),
        ({"trainer": "reference", "recomputation": {"feed_forward_slices": 2}}, "COMBINATION_NOT_ALLOWED"),
        (
            {"spec": {"training_type": "full"}, "trainer": "fast", "recomputation": {"feed_forward_slices": 2}},
            "COMBINATION_NOT_ALLOWED",
        ),
        ({"recomputation": {"feed_forward_slices": 0}}, "INVALID_FIELD"),
        ({"recomputation": {"feed_forward_slices": 65}}, "INVALID_FIELD"),
        ({"base_weights": "somewhere"}, "INVALID_FIELD"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refusal) as refused:
        _plan(**values)
    assert refused.value.reason == reason
    assert "hyperparameters." in refused.value.field


def test_memory_of_unknown_size_changes_nothing() -> None:
    resolved = _plan(CPU, trainer="fast").hyperparameters
    assert resolved.recomputation == NOTHING
    assert resolved.base_weights == "streamed"


def _documented() -> list[list[str]]:
    page = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
    lines = page.split("<!-- fast memory example -->")[1].split("<!-- end -->")[0].strip().splitlines()[2:]
    return [[cell.strip(" `") for cell in line.strip("| ").split("|")] for line in lines]


@pytest.mark.parametrize("row", _documented(), ids=lambda row: row[0])
def test_documented_plans(row: list[str]) -> None:
    device, elementwise, feed_forward, full, offload, slices, weights, peak, total = row
    checked = _plan(_with_memory(float(device.removesuffix(" GiB"))))
    assert checked.hyperparameters.recomputation == Recomputation(
        full_layers=int(full),
        feed_forward_layers=int(feed_forward),
        elementwise_layers=int(elementwise),
        offload=offload == "yes",
        feed_forward_slices=int(slices),
    )
    assert checked.hyperparameters.base_weights == weights
    assert [checked.memory.peak_bytes / 1e9, checked.memory.total_bytes / 1e9] == pytest.approx(
        [float(peak), float(total)], abs=0.0051
    )


def test_what_waits_on_the_host_is_in_the_estimate() -> None:
    offloaded = _plan(recomputation={"offload": True})
    # An input is 8,192 tokens of 3,072 numbers of two bytes: 48 MiB.
    assert offloaded.memory.host_bytes == 28 * 48 * 1024**2
    assert offloaded.memory.to_json()["host_bytes"] == str(offloaded.memory.host_bytes)
    assert "1.3 GiB of the host's memory" in offloaded.memory_reason
    some = _plan(recomputation={"full_layers": 3, "offload": True}, batch={"tokens": 8193})
    assert some.memory.host_bytes == 3 * 56 * 1024**2
    assert _plan(_with_memory(5)).memory.host_bytes == offloaded.memory.host_bytes
    assert _plan(recomputation={"full_layers": 28}).memory.host_bytes == 0
    assert _plan(trainer="reference", gradient_checkpointing=True).memory.host_bytes == 0
    # It is the device's own memory there, and counted.
    assert _plan(CPU, trainer="fast", recomputation={"offload": True}).memory.host_bytes == 0


@pytest.mark.parametrize(
    ("needed", "place"),
    [(0, 0), (1, 4), (4 << 20, 4), ((4 << 20) + 1, 8), (17 << 20, 20), (32 << 20, 32), ((32 << 20) + 1, 40),
     (48 << 20, 48), ((48 << 20) + 1, 56), (63 << 20, 64), (65 << 20, 80), (1000 << 20, 1024)],
)  # fmt: skip
def test_places_come_in_few_sizes(needed: int, place: int) -> None:
    assert place_bytes(needed) == place << 20


def test_a_host_without_that_memory_refuses() -> None:
    needed = 28 * 48 * 1024**2
    enough = needed + HOST_SPARE_BYTES
    for known in (0, enough):
        check_host_fit(needed, replace(H100, host_memory_bytes=known))
    check_host_fit(0, replace(H100, host_memory_bytes=1))
    with pytest.raises(Refusal) as refused:
        check_host_fit(needed, replace(H100, host_memory_bytes=enough - 1))
    assert refused.value.reason == "DOES_NOT_FIT"
    assert refused.value.details["host_memory_bytes"] == str(enough - 1)


def test_on_a_cpu_nothing_is_saved_by_the_host_s_memory() -> None:
    peaks = [
        _plan(CPU, trainer="fast", recomputation={"full_layers": 28, "offload": offload}).memory.peak_bytes
        for offload in (False, True)
    ]
    assert peaks[1] >= peaks[0]
