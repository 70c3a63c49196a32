"""The arithmetic of memory: against the document's worked example, and in how it answers to each setting."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.random_models import SHAPES
from gpu_service.domain.defaults import resolve_batch
from gpu_service.domain.device import Device
from gpu_service.domain.memory_calibration import MAX_CELLS, Calibration
from gpu_service.domain.memory_passes import ExampleSize, LargestPasses, PassShape, largest_possible
from gpu_service.domain.spec import Batch
from tests.unit.memory.shapes import H100, make_base, make_estimate

_DOCUMENT = Path(__file__).parents[3] / "docs" / "training.md"
_PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "peak", "total")


def _documented() -> list[tuple[str, list[float]]]:
    text = _DOCUMENT.read_text(encoding="utf-8").split("<!-- memory example -->")[1].split("<!-- end -->")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.strip().splitlines()[2:]]
    return [(cells[0], [float(cell) for cell in cells[1:]]) for cells in rows]


@pytest.mark.parametrize(("name", "numbers"), _documented(), ids=lambda value: value if isinstance(value, str) else "")
def test_worked_example(name: str, numbers: list[float]) -> None:
    training_type, *options = re.findall(r"`([^`]+)`", name)
    estimate = make_estimate(training_type, gradient_checkpointing="gradient_checkpointing" in options)
    assert [getattr(estimate, f"{part}_bytes") / 1e9 for part in _PARTS] == pytest.approx(numbers, abs=0.0051)


_MEASURED = json.loads((Path(__file__).parents[3] / "benchmarks" / "memory_h100.json").read_text())["cells"]


@pytest.mark.parametrize("cell", _MEASURED, ids=lambda cell: f"{cell['size']}-{cell['training_type']}-{cell['length']}")
def test_measured_peaks_are_predicted(cell: dict[str, Any]) -> None:
    shape = SHAPES[cell["size"]]
    base = make_base(
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        layers=shape.layers,
        heads=shape.heads,
        key_value_heads=shape.key_value_heads,
        vocabulary=shape.vocabulary,
    )
    if not shape.tied:
        base = replace(base, num_parameters=base.num_parameters + shape.vocabulary * shape.hidden)
    quantization = {
        name: cell[key] for name, key in (("method", "quantization"), ("compute_dtype",) * 2) if key in cell
    }
    targets = min(round(cell["length"] * cell.get("targets", 1)), cell["length"] - 1)
    estimate = make_estimate(
        cell["training_type"],
        base=base,
        examples=(ExampleSize(cell["length"], targets, cell["length"]),) * cell.get("examples", 1),
        quantization=quantization,
        gradient_checkpointing=cell.get("checkpointing", False),
        optimizer={"name": cell.get("optimizer", "adamw")},
        lora={"rank": cell.get("rank", 16)},
    )
    # As README and training page say.
    assert estimate.peak_bytes == pytest.approx(cell["peak_bytes"], rel=0.013)
    assert estimate.total_bytes > cell["peak_bytes"]


def _bytes_of(training_type: str, tokens: int, **options: Any) -> int:
    examples = (ExampleSize(tokens, 16, tokens),)
    return make_estimate(training_type, examples=examples, **options).activations_bytes


@pytest.mark.parametrize(
    ("training_type", "options", "per_token"),
    [
        ("qlora", {}, 18 * 2048 + 6 * 2048 + 4 * 512 + 14 * 8192 + 14 * 16 + 4 * 32 + 8),
        ("qlora", {"quantization": {"method": "int8"}}, 26 * 2048 + 6 * 2048 + 4 * 512 + 18 * 8192 + 14 * 16 + 136),
        ("lora", {}, 18 * 2048 + 6 * 2048 + 4 * 512 + 8 * 8192 + 14 * 16 + 4 * 32 + 8),
        ("full", {}, 26 * 2048 + 6 * 2048 + 4 * 512 + 8 * 8192 + 4 * 32 + 8),
    ],
)
def test_a_layer_keeps_what_the_document_says(training_type: str, options: dict[str, Any], per_token: int) -> None:
    shallow, deep = (_bytes_of(training_type, 16384, base=make_base(layers=layers), **options) for layers in (16, 17))
    casts = 2 * make_base(layers=1).num_linear_parameters + 2 * 2 * 2048 if training_type == "full" else 0
    # An adapter's casts, and for `full` the gradient that counts beside, are all that a layer has besides.
    gradients = 4 * (casts // 2)
    assert deep - shallow + gradients == pytest.approx(16384 * per_token + casts, rel=0.01)


def test_dropout_keeps_a_byte_for_each_input_of_an_adapter() -> None:
    plain, dropped = (_bytes_of("lora", 4096, lora={"rank": 16, "dropout": rate}) for rate in (0.0, 0.1))
    assert dropped - plain == 4096 * 16 * (6 * 2048 + 8192)


def test_logits_grow_with_targets_alone() -> None:
    few, many = (make_estimate(examples=(ExampleSize(4096, count, 4096),)) for count in (2048, 4096))
    assert many.peak_bytes - few.peak_bytes == pytest.approx(12 * 2048 * 128_256, rel=0.01)


def test_memory_grows_with_tokens_and_not_with_their_square() -> None:
    one = _bytes_of("qlora", 8192)
    assert _bytes_of("qlora", 16384) < 2.1 * one
    # In float32 with shared keys no kernel is fused, and scores of tokens by tokens are made.
    plain = [_bytes_of("qlora", tokens, quantization={"compute_dtype": "float32"}) for tokens in (4096, 8192)]
    assert plain[1] > 2.5 * plain[0]


def test_smaller_passes_take_less_and_the_gradient_stands_beside_them() -> None:
    examples = (ExampleSize(2048, 2048, 2048),) * 4
    whole = make_estimate("full", examples=examples)
    parts = make_estimate("full", examples=examples, batch={"examples": 4, "micro_batch_examples": 1})
    assert parts.peak_bytes < whole.peak_bytes
    alone = make_estimate("full", examples=examples[:1])
    assert parts.peak_bytes > alone.peak_bytes


def test_on_a_cpu_the_peak_is_the_process() -> None:
    estimate = make_estimate(device=Device())
    assert estimate.peak_bytes == estimate.total_bytes
    assert estimate.overhead_bytes > 0


def _measured_on_a_cpu() -> Iterator[Any]:
    for name in ("memory_cpu", "memory_cpu_cuda_build"):
        found = json.loads((Path(__file__).parents[3] / "benchmarks" / f"{name}.json").read_text())
        device = Device(has_cuda_build="+cu" in found["torch"])
        yield from (pytest.param(device, cell, id=f"{name}-{cell['cell']}") for cell in found["cells"])


@pytest.mark.parametrize(("device", "cell"), _measured_on_a_cpu())
def test_measured_peaks_on_a_cpu_are_predicted(device: Device, cell: dict[str, Any]) -> None:
    """By `benchmarks/memory_grid.py`. The C library's heap has half of it, and no two runs have the same holes."""
    facts = cell["facts"]
    base = make_base(hidden=576, intermediate=1536, layers=30, heads=9, key_value_heads=3, vocabulary=49_152)
    options: dict[str, Any] = {} if facts["training_type"] == "full" else {"lora": {"rank": facts["rank"]}}
    length = facts["length"]
    estimate = make_estimate(
        facts["training_type"],
        base=base,
        examples=(ExampleSize(length, round(length * facts["targets"]), length),) * facts["examples"],
        batch={"examples": facts["examples"]},
        device=device,
        gradient_checkpointing=facts["checkpointing"],
        **options,
    )
    assert estimate.peak_bytes == pytest.approx(cell["measured"], rel=0.15)
    # As the plan of that run had it, whose rows have a target less each.
    assert estimate.peak_bytes == pytest.approx(cell["predicted"], rel=0.02)


def test_a_build_for_cuda_takes_more_of_a_cpus_process_alone() -> None:
    facts = {"type": "cpu", "name": "cpu", "total_memory_bytes": 1 << 36}
    plain, larger = (make_estimate(device=Device.from_json({**facts, "has_cuda_build": has})) for has in (False, True))
    added = larger.overhead_bytes - plain.overhead_bytes
    assert added > 2**28
    assert larger == replace(
        plain,
        overhead_bytes=plain.overhead_bytes + added,
        process_bytes=plain.process_bytes + added,
        analytic_bytes=plain.analytic_bytes + added,
    )
    assert larger.standing_bytes == plain.standing_bytes + added
    assert make_estimate(device=replace(H100, has_cuda_build=True)) == make_estimate()


def test_holes_of_a_heap_are_a_cpus_and_of_blocks_that_it_has() -> None:
    base = make_base(layers=2)
    few, many = (make_estimate(base=base, examples=(ExampleSize(n, 8, n),), device=Device()) for n in (8, 512))
    assert many.overhead_bytes > few.overhead_bytes
    # Made again, they are made all the same.
    again = make_estimate(base=base, examples=(ExampleSize(512, 8, 512),), device=Device(), gradient_checkpointing=True)
    assert again.overhead_bytes == many.overhead_bytes
    assert again.activations_bytes < many.activations_bytes
    # Wider ones are mapped, and gone when they are freed: first those of the feed-forward part, then all.
    wide, wider = (make_estimate(base=base, examples=(ExampleSize(n, 8, n),), device=Device()) for n in (1100, 4200))
    assert few.overhead_bytes < wide.overhead_bytes < 1100 / 512 * many.overhead_bytes
    assert wider.overhead_bytes < few.overhead_bytes
    assert wide.standing_bytes == few.standing_bytes


def test_largest_passes_are_those_of_the_loop() -> None:
    passes = LargestPasses(resolve_batch(Batch(examples=4, micro_batch_examples=2, micro_batch_tokens=100)))
    passes.add_step([ExampleSize(60, 1, 60), ExampleSize(50, 9, 50), ExampleSize(30, 2, 30), ExampleSize(10, 1, 10)])
    # 60 alone, 50 and 30 together, 10 alone: only the second is largest in something that 60 is not.
    assert set(passes.shapes) == {PassShape(60, 1, 60), PassShape(80, 11, 50)}
    assert passes.accumulates
    long = LargestPasses(resolve_batch(Batch(examples=1, micro_batch_tokens=10)))
    long.add_step([ExampleSize(60, 1, 60)])
    assert long.shapes == (PassShape(60, 1, 60),)
    assert not long.accumulates


def test_an_evaluation_is_made_of_what_is_held_out() -> None:
    """In order and by the same limits; the longest example alone says nothing of the passes."""
    passes = LargestPasses(resolve_batch(Batch(examples=2)))
    passes.add_evaluation([ExampleSize(*size) for size in ((90, 1, 90), (10, 5, 10), (60, 9, 60), (5, 1, 5))])
    assert passes.evaluated == (PassShape(100, 6, 90), PassShape(65, 10, 60))
    assert passes.shapes == ()


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (Batch(examples=4), PassShape(4 * 128, 4 * 128, 128)),
        (Batch(examples=4, micro_batch_examples=1), PassShape(128, 128, 128)),
        (Batch(tokens=1000), PassShape(1000, 1000, 128)),
        (Batch(tokens=1000, micro_batch_tokens=64), PassShape(128, 128, 128)),
        (Batch(tokens=1000, micro_batch_examples=2), PassShape(256, 256, 128)),
    ],
)
def test_what_may_be_before_data_is_read(batch: Batch, expected: PassShape) -> None:
    assert largest_possible(resolve_batch(batch), 128).shapes == (expected,)


def test_calibration_scales_by_the_nearest_cell() -> None:
    plain = make_estimate()
    assert plain.basis == "analytic"
    higher = Calibration().with_cell(plain.peak_bytes * 2, plain.peak_bytes * 3)
    scaled = make_estimate(calibration=higher)
    assert scaled.basis == "calibrated"
    assert scaled.peak_bytes == pytest.approx(1.5 * plain.peak_bytes, rel=1e-6)
    assert scaled.analytic_bytes == plain.peak_bytes
    assert scaled.weights_bytes == plain.weights_bytes
    # One that is too far off says nothing.
    far = Calibration().with_cell(plain.peak_bytes * 10, plain.peak_bytes * 15)
    assert make_estimate(calibration=far) == plain


def test_calibration_never_falls_below_what_was_measured() -> None:
    calibration = Calibration().with_cell(1000, 1300).with_cell(1000, 900)
    assert calibration.scale(1000) == 1300
    assert calibration.with_cell(1100, 1000).scale(1000) == 1300
    # A peak that comes from something else on the device does not make estimates of others absurd.
    assert Calibration().with_cell(1000, 9000).scale(1100) == 2200
    assert Calibration().with_cell(1000, 9000).scale(1000) == 9000
    assert Calibration().scale(1000) is None


def test_calibration_is_bounded_and_comes_back_from_json() -> None:
    calibration = Calibration()
    for number in range(1, 3 * MAX_CELLS):
        calibration = calibration.with_cell(1000 + number, 2000)
    assert len(calibration.cells) == MAX_CELLS
    assert Calibration.from_json(calibration.to_json()) == calibration
    for broken in ([[1]], [[0, 5]], [["a", 5]], 7):
        with pytest.raises((ValueError, TypeError)):
            Calibration.from_json(broken)


def test_peak_of_the_fast_path_is_predicted() -> None:
    """As `benchmarks/gpu_training.py` measured it on an H100: a 3B shape, rank 16 on all seven, four rows of 2,048."""
    base = make_base(hidden=3072, intermediate=8192, layers=28, heads=24, key_value_heads=8)
    estimate = make_estimate(
        base=base,
        examples=(ExampleSize(2048, 2047, 2048),) * 4,
        trainer="fast",
    )
    assert estimate.peak_bytes / 2**30 == pytest.approx(23.4, rel=0.03)


def test_fast_path_takes_less_than_the_plain_one() -> None:
    for recomputes in (False, True):
        fast, plain = (
            make_estimate(trainer=trainer, gradient_checkpointing=recomputes) for trainer in ("fast", "reference")
        )
        assert fast.peak_bytes < plain.peak_bytes


_3B = {"hidden": 3072, "intermediate": 8192, "layers": 28, "heads": 24, "key_value_heads": 8}


def _full(**options: Any) -> Any:
    examples = (ExampleSize(2048, 2047, 2048),) * 4
    return make_estimate("full", base=make_base(**_3B), examples=examples, trainer="fast", **options)


def test_full_training_fits_the_devices_that_it_is_made_for() -> None:
    """8,192 tokens a step: nothing recomputed on 80 GiB, and everything in 17.5."""
    standard, low = _full(), _full(full_memory="low", gradient_checkpointing=True)
    assert standard.total_bytes < H100.total_memory_bytes
    assert low.peak_bytes < 17.5 * 2**30
    # As `benchmarks/gpu_full_training.py` measured them on an H100.
    assert standard.peak_bytes / 2**30 == pytest.approx(67.94, rel=0.005)
    assert low.peak_bytes / 2**30 == pytest.approx(15.10, rel=0.005)
    trained = make_base(**_3B).num_parameters
    assert standard.weights_bytes == 6 * trained
    assert (standard.gradients_bytes, standard.optimizer_bytes) == (2 * trained, 8 * trained)
    assert low.weights_bytes == 2 * trained
    assert low.optimizer_bytes < 2.04 * trained
    assert low.gradients_bytes < 0.15 * 2 * trained


def test_gradients_of_several_passes_are_held_in_float32() -> None:
    several = _full(batch={"examples": 4, "micro_batch_examples": 2})
    assert several.gradients_bytes == 2 * _full().gradients_bytes
