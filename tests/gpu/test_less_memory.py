"""What a GPU does without when memory is short, and what a run gives back of the host's memory."""

from __future__ import annotations

import gc
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

_PLACE_BYTES = 64 * 1024**2
_NUM_PLACES = 6
_SLACK_BYTES = 96 * 1024**2


@pytest.fixture(autouse=True)
def _on_a_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def test_memory_of_the_host_is_locked_and_given_back() -> None:
    import torch

    from gpu_service.engine.fast_path.offloading import HostShelf

    torch.zeros(1, device="cuda")
    shelf = HostShelf(torch.device("cuda"))
    process = psutil.Process()
    inputs = [
        torch.randn(_PLACE_BYTES // 4, device="cuda", generator=torch.Generator("cuda").manual_seed(number))
        for number in range(_NUM_PLACES)
    ]
    sums = [value.sum() for value in inputs]
    before = process.memory_info().rss
    for times in range(3):
        # A larger pass, then one that fits.
        part = _PLACE_BYTES // 4 if times else _PLACE_BYTES // 8
        shelf.clear()
        for number, value in enumerate(inputs):
            shelf.put(number, value[:part].clone())
        for number in reversed(range(_NUM_PLACES)):
            found = shelf.take(number)
            assert torch.equal(found, inputs[number][:part])
            del found
    assert all(place.is_pinned() for place in shelf._places.values())
    assert process.memory_info().rss - before > (_NUM_PLACES - 1) * _PLACE_BYTES
    shelf.close()
    gc.collect()
    assert process.memory_info().rss - before < _SLACK_BYTES
    # And again, from nothing.
    shelf.put(0, inputs[0])
    assert torch.equal(shelf.take(0).sum(), sums[0])
    shelf.close()


def test_a_shelf_that_nobody_closed_is_in_nobody_s_way() -> None:
    """Its addresses are given out again, and can be locked again."""
    import torch

    from gpu_service.engine.fast_path.offloading import HostShelf

    value = torch.randn(_PLACE_BYTES // 4, device="cuda")
    for _ in range(5):
        shelf = HostShelf(torch.device("cuda"))
        for number in range(3):
            shelf.put(number, value)
        assert torch.equal(shelf.take(2), value)
        del shelf
        gc.collect()


def test_a_released_model_keeps_no_memory_of_the_host() -> None:
    import torch

    from gpu_service.domain.recomputation import everything
    from tests.fakes.fast_models import fast_gradients, hold_in_nf4, make_fast, make_peft, nats
    from tests.fakes.flat_models import VOCABULARY_SIZE
    from tests.fakes.planned_rows import PlannedRows, make_examples

    rows = PlannedRows(make_examples((300, 512, 40), vocabulary_size=VOCABULARY_SIZE, seed=1))
    stats = torch.cuda.host_memory_stats
    results: list[Any] = []
    for offload in (False, True):
        model = make_peft(
            dtype=torch.bfloat16, quantize=lambda base: hold_in_nf4(base, device="cuda")
        ).to("cuda")  # fmt: skip
        fast = make_fast(
            model, device="cuda", dtype=torch.bfloat16, recomputation=everything(2, offload=offload)
        )  # fmt: skip
        held = stats().get("allocated_bytes.current", 0)
        values = nats(fast, rows, device="cuda")
        fast_gradients(model, fast, values.sum())
        results.append(values)
        # torch's own allocator, which keeps what it once had, had no part in it but for a pass' few numbers.
        assert stats().get("allocated_bytes.current", 0) - held < 1024**2
        shelf = fast.decoder.shelf
        assert (shelf is not None) == offload
        fast.release()
        assert shelf is None or not shelf._pinned
    assert torch.equal(*results)


def test_restored_weights_are_let_go_of_with_the_same_results() -> None:
    import torch

    from tests.fakes.fast_models import fast_gradients, hold_in_nf4, make_fast, make_peft, nats
    from tests.fakes.flat_models import VOCABULARY_SIZE
    from tests.fakes.planned_rows import PlannedRows, make_examples

    rows = PlannedRows(make_examples((300, 512, 40), vocabulary_size=VOCABULARY_SIZE, seed=1))
    sizes = {"num_hidden_layers": 4, "hidden_size": 1024, "intermediate_size": 4096}
    model = make_peft(
        "llama", sizes, dtype=torch.bfloat16, quantize=lambda base: hold_in_nf4(base, device="cuda")
    ).to("cuda")  # fmt: skip
    fast = make_fast(model, device="cuda", dtype=torch.bfloat16, keeps_weights=True)
    kept = nats(fast, rows, device="cuda")
    gradients = fast_gradients(model, fast, kept.sum())
    gc.collect()
    held = torch.cuda.memory_allocated()
    assert fast.stream_weights()
    gc.collect()
    weights = sum(one.frozen.num_rows * one.frozen.in_features for one in fast._projections)
    # All of it in two bytes a weight, less one matrix that is restored into, and margins.
    assert held - torch.cuda.memory_allocated() > 1.2 * weights
    streamed = nats(fast, rows, device="cuda")
    assert torch.equal(streamed, kept)
    for name, value in fast_gradients(model, fast, streamed.sum()).items():
        # Attention's backward kernel adds in no fixed order.
        assert (value - gradients[name]).norm() <= 1e-2 * gradients[name].norm() + 1e-6
    fast.release()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_slices_change_the_order_of_sums_alone(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In less memory, and again to the bit."""
    import torch

    from gpu_service.domain.recomputation import everything
    from tests.fakes.fast_models import fast_gradients, hold_in_nf4, make_fast, make_peft, nats
    from tests.fakes.flat_models import VOCABULARY_SIZE
    from tests.fakes.planned_rows import PlannedRows, make_examples

    # Attention's backward kernel adds in any order unless torch is told that results must repeat.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    rows = PlannedRows(make_examples((*(512,) * 15, 300, 212), vocabulary_size=VOCABULARY_SIZE, seed=1))
    sizes = {"num_hidden_layers": 3, "hidden_size": 512, "intermediate_size": 4096}
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for slices, offload in ((1, False), (4, False), (4, True), (3, True)):
            model = make_peft(
                "llama", sizes, rank=16, dtype=torch.bfloat16, quantize=lambda base: hold_in_nf4(base, device="cuda")
            ).to("cuda")
            for module in model.modules():
                if hasattr(module, "lora_dropout") and dropout:
                    module.lora_dropout["default"] = torch.nn.Dropout(dropout)
            way = everything(3, offload=offload, feed_forward_slices=slices)
            fast = make_fast(model, device="cuda", dtype=torch.bfloat16, recomputation=way)
            fast.train()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            torch.manual_seed(1)
            values = nats(fast, rows, device="cuda")
            gradients = fast_gradients(model, fast, values.sum() / 100)
            peak = torch.cuda.max_memory_allocated() - held
            found.append((values.detach(), torch.cat([one.flatten() for one in gradients.values()]), peak))
            fast.release()
            del model, fast, gradients, values
            gc.collect()
    finally:
        torch.use_deterministic_algorithms(False)
    whole, *sliced = found
    for values, gradient, peak in sliced:
        torch.testing.assert_close(values, whole[0], rtol=1e-2, atol=1e-2)
        assert (gradient - whole[1]).norm() <= 2e-2 * whole[1].norm()
        assert peak < 0.6 * whole[2]
    assert torch.equal(sliced[0][0], sliced[1][0])
    assert torch.equal(sliced[0][1], sliced[1][1])
