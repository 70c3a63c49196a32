"""What the fast path does without when memory is short, and what it gives back: with the same results to the bit."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from gpu_service import host_memory
from gpu_service.domain.recomputation import Recomputation, everything
from gpu_service.engine.fast_path.full_model import FullModel, FullSettings
from tests.fakes.fast_models import fast_gradients, hold_in_nf4, make_fast, make_peft, nats
from tests.fakes.flat_models import LENGTHS, VOCABULARY_SIZE, make_model
from tests.fakes.planned_rows import PlannedRows, make_examples

_NUM_LAYERS = 2


@pytest.fixture(scope="module")
def rows() -> PlannedRows:
    return PlannedRows(make_examples(LENGTHS, vocabulary_size=VOCABULARY_SIZE, seed=3))


def _held_numbers(fast: Any) -> int:
    """Numbers in all storages that the matrices and margins of its projections lie in."""
    storages: dict[int, int] = {}
    for block in fast.decoder.blocks:
        for one in (block.attention_in, block.attention_out, block.mlp_in, block.mlp_out):
            for tensor in (
                one.frozen.forward_matrix(adapted=False),
                one.frozen.margins.right,
                one.frozen.margins.below,
            ):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
    return sum(storages.values())


@pytest.mark.parametrize("double", [True, False])
def test_restored_weights_can_be_let_go_of_between_passes(double: bool, rows: PlannedRows) -> None:
    model = make_peft(quantize=lambda base: hold_in_nf4(base, double=double))
    fast = make_fast(model, keeps_weights=True)
    kept = nats(fast, rows)
    gradients = fast_gradients(model, fast, kept.sum())
    held = _held_numbers(fast)
    assert "at each use" in fast.stream_weights()
    assert fast.stream_weights() == ""
    streamed = nats(fast, rows)
    assert _held_numbers(fast) < 0.75 * held
    assert torch.equal(streamed, kept)
    for name, value in fast_gradients(model, fast, streamed.sum()).items():
        assert torch.equal(value, gradients[name])
    fast.release()


def test_weights_without_another_form_stay(rows: PlannedRows) -> None:
    fast = make_fast(make_peft(), keeps_weights=True)
    before = nats(fast, rows)
    assert fast.stream_weights() == ""
    assert make_fast(make_peft(quantize=hold_in_nf4), in_fp8=True).stream_weights() == ""
    assert torch.equal(nats(fast, rows), before)


def test_memory_of_the_host_is_given_back_with_the_base(rows: PlannedRows) -> None:
    model = make_peft()
    fast = make_fast(model, recomputation=everything(_NUM_LAYERS, offload=True))
    fast_gradients(model, fast, nats(fast, rows).sum())
    shelf = fast.decoder.shelf
    assert shelf is not None
    assert [len(place) % (4 << 20) for place in shelf._places.values()] == [0] * _NUM_LAYERS
    places = [weakref.ref(place) for place in shelf._places.values()]
    fast.release()
    gc.collect()
    # Whoever still holds the shelf holds no memory.
    assert all(place() is None for place in places)


def test_a_shelf_takes_passes_of_any_size(rows: PlannedRows) -> None:
    """A larger pass needs other places, a smaller one fits those that there are."""
    model = make_peft()
    kept, offloaded = make_fast(model), make_fast(make_peft(), recomputation=everything(_NUM_LAYERS, offload=True))
    for seed, lengths in enumerate(((40, 9), (70, 64, 30), (5,))):
        some = PlannedRows(make_examples(lengths, vocabulary_size=VOCABULARY_SIZE, seed=seed))
        assert torch.equal(nats(offloaded, some), nats(kept, some))


def test_a_host_without_room_is_not_resorted_to(rows: PlannedRows, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = make_fast(make_peft(), recomputation=everything(_NUM_LAYERS))
    nats(fast, rows)
    needed = _NUM_LAYERS * (4 << 20) + (2 << 30)
    # A CPU's memory is the host's anyway.
    monkeypatch.setattr(fast, "_device", torch.device("meta"))
    monkeypatch.setattr(host_memory, "available_bytes", lambda: needed - 1)
    assert fast.recompute_more() == ""
    monkeypatch.setattr(host_memory, "available_bytes", lambda: needed)
    assert "host memory" in fast.recompute_more()


def test_what_waits_on_the_host_already_is_room_for_more_of_it(
    rows: PlannedRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given back before the rest is put there."""
    some = Recomputation(full_layers=1, offload=True)
    causal = make_model("llama", {}, torch.float32)
    full = FullModel(causal, FullSettings(device=torch.device("cpu"), compute_dtype=torch.float32, recomputation=some))
    fast = make_fast(make_peft(), recomputation=some)
    for model, layers in ((fast, _NUM_LAYERS), (full, len(causal.model.layers))):
        nats(model, rows).sum().backward()
        needed = layers * (4 << 20) + (2 << 30)
        if model is fast:
            monkeypatch.setattr(fast, "_device", torch.device("meta"))
        else:
            monkeypatch.setattr(full, "_settings", replace(full._settings, device=torch.device("meta")))
        monkeypatch.setattr(host_memory, "available_bytes", lambda needed=needed: needed - (4 << 20) - 1)
        assert model.recompute_more() == ""
        monkeypatch.setattr(host_memory, "available_bytes", lambda needed=needed: needed - (4 << 20))
        assert "host memory" in model.recompute_more()
