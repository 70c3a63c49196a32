"""The fast path on a CUDA device: models against float32, passes against each other, runs against the plain path."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

_FAMILIES = ("llama", "qwen2", "qwen3")


@pytest.fixture(autouse=True)
def _on_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)


@pytest.mark.parametrize("family", _FAMILIES)
def test_float32_is_exact(family: str) -> None:
    from tests.fakes.fast_models import (
        example_rows,
        fast_gradients,
        gradient_error,
        make_fast,
        make_peft,
        nats,
        plain_gradients,
    )

    reference = make_peft(family).to("cuda")
    expected = nats(reference, example_rows(), device="cuda").sum() / 100
    model = make_peft(family).to("cuda")
    fast = make_fast(model, device="cuda")
    found = nats(fast, example_rows(), device="cuda").sum() / 100
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert gradient_error(fast_gradients(model, fast, found), plain_gradients(reference, expected)) < 1e-5


@pytest.mark.parametrize("family", _FAMILIES)
@pytest.mark.parametrize("quantized", [True, False])
def test_bfloat16_is_as_near_to_float32_as_the_plain_path(family: str, quantized: bool) -> None:
    import torch

    from tests.fakes.fast_models import (
        example_rows,
        fast_gradients,
        gradient_error,
        hold_in_nf4,
        make_fast,
        make_peft,
        nats,
        plain_gradients,
    )

    def make(dtype: torch.dtype) -> Any:
        quantize = (lambda base: hold_in_nf4(base, device="cuda")) if quantized else None
        return make_peft(family, dtype=dtype, quantize=quantize).to("cuda")

    # The base's own rounding, to 16 bits or to 4, is the same for all three.
    bfloat16 = make(torch.bfloat16)
    exact = make(torch.bfloat16).float()
    expected = nats(exact, example_rows(), device="cuda").sum() / 100
    expected_gradients = plain_gradients(exact, expected)
    with torch.autocast("cuda", torch.bfloat16):
        plain = nats(bfloat16, example_rows(), device="cuda").sum() / 100
    plain_error = gradient_error(plain_gradients(bfloat16, plain), expected_gradients)
    model = make(torch.bfloat16)
    fast = make_fast(model, device="cuda", dtype=torch.bfloat16)
    found = nats(fast, example_rows(), device="cuda").sum() / 100
    error = gradient_error(fast_gradients(model, fast, found), expected_gradients)
    assert abs(float(found - expected)) <= max(2 * abs(float(plain - expected)), 1e-3 * float(expected))
    assert error <= 2 * plain_error


@pytest.mark.parametrize("keeps_weights", [True, False])
def test_recomputing_and_keeping_change_nothing(keeps_weights: bool) -> None:
    import torch

    from tests.fakes.fast_models import (
        example_rows,
        fast_gradients,
        gradient_error,
        hold_in_nf4,
        make_fast,
        make_peft,
        nats,
    )

    results = []
    for recomputes in (False, True):
        model = make_peft("llama", dtype=torch.bfloat16, quantize=lambda base: hold_in_nf4(base, device="cuda"))
        model = model.to("cuda")
        fast = make_fast(model, device="cuda", dtype=torch.bfloat16, keeps_weights=keeps_weights, recomputes=recomputes)
        found = nats(fast, example_rows(), device="cuda")
        results.append((found, fast_gradients(model, fast, found.sum())))
    (first, gradients), (second, gradients_again) = results
    assert torch.equal(first, second)
    # Attention's backward kernel adds in no fixed order.
    assert gradient_error(gradients_again, gradients) < 1e-3


def test_examples_do_not_see_each_other() -> None:
    import torch

    from tests.fakes.fast_models import make_fast, make_peft, nats
    from tests.fakes.flat_models import LENGTHS, VOCABULARY_SIZE
    from tests.fakes.planned_rows import PlannedRows, make_examples

    examples = make_examples(LENGTHS, vocabulary_size=VOCABULARY_SIZE, seed=3)
    others = make_examples(LENGTHS, vocabulary_size=VOCABULARY_SIZE, seed=4)
    fast = make_fast(make_peft(dtype=torch.bfloat16).to("cuda"), device="cuda", dtype=torch.bfloat16)
    before = nats(fast, PlannedRows(examples), device="cuda")
    after = nats(fast, PlannedRows([*examples[:5], others[5], *examples[6:]]), device="cuda")
    assert torch.equal(before[:5], after[:5])
    assert torch.equal(before[6:], after[6:])
    assert before[5] != after[5]


def test_no_step_waits_for_the_device() -> None:
    """Nor does the end of one; a step that is left out leaves weights, moments and their counter alone."""
    import torch

    from gpu_service.engine.fast_path.flat_adamw import FlatAdamW
    from gpu_service.engine.training.batches import collate
    from gpu_service.engine.training.likelihood import nats_by_sequence
    from gpu_service.engine.training.updates import UpdatesOnDevice
    from tests.fakes.fast_models import example_rows, hold_in_nf4, make_fast, make_peft
    from tunesmith.common.v1 import training_spec_pb2

    model = make_peft("qwen3", dtype=torch.bfloat16, quantize=lambda base: hold_in_nf4(base, device="cuda")).to("cuda")
    fast = make_fast(model, device="cuda", dtype=torch.bfloat16)
    settings = training_spec_pb2.Optimizer(learning_rate=1e-3, beta1=0.9, beta2=0.99, epsilon=1e-8)
    optimizer = FlatAdamW(fast.flat_adapter, settings)
    device = torch.device("cuda", 0)
    updates = UpdatesOnDevice(optimizer=optimizer, inner=optimizer, device=device, halts=False)
    rows = example_rows()

    def step(factor: float) -> Any:
        updates.begin()
        batch = collate(rows.as_data(), rows.references).to(device)
        nats = nats_by_sequence(fast, batch)
        torch.autograd.backward(nats.sum() * factor / 100)
        norm = torch.nn.utils.clip_grad_norm_([fast.adapter], 1.0)
        return updates.apply([nats.detach()[:, None]], norm, 100)

    assert step(1.0)().updated
    before = [fast.adapter.detach().clone(), *(value.clone() for value in optimizer.state[fast.adapter].values())]
    torch.cuda.set_sync_debug_mode("error")
    try:
        reads = [step(float("inf")), step(1.0)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    left_out, made = (read() for read in reads)
    assert (left_out.is_finite, made.updated) == (False, True)
    assert 0 < made.seconds < 60
    assert float(optimizer.state[fast.adapter]["step"]) == float(before[1]) + 1 == 2
    reads = [step(float("nan"))]
    after = [fast.adapter.detach().clone(), *(value.clone() for value in optimizer.state[fast.adapter].values())]
    assert not reads[0]().updated
    assert all(torch.isfinite(value).all() for value in after)
    assert not torch.equal(before[0], after[0])


@pytest.mark.parametrize("training_type", ["qlora", "lora"])
def test_whole_run_is_that_of_the_plain_path(training_type: str, tmp_path: Any) -> None:
    """Two hundred steps through planner and engine, by both."""
    from tests.fakes.curves import hold_same_curve, read_both, train_by_both
    from tests.fakes.engine_runs import Workspace

    device = {"type": "cuda", "index": 0}
    directories = train_by_both(
        Workspace(root=tmp_path), training_type=training_type, device=device, compute_dtype="bfloat16"
    )
    fast, plain = read_both(directories)
    hold_same_curve(fast, plain)
    assert fast.of("plan")[0].resolved.trainer == "fast"
    assert any("fast path" in event.message for event in fast.of("log"))
    assert plain.of("plan")[0].resolved.trainer == "reference"
    ends = [log.of("evaluation")[-1].loss for log in (fast, plain) if log.of("evaluation")]
    assert not ends or ends[0] == pytest.approx(ends[1], rel=1e-2)
