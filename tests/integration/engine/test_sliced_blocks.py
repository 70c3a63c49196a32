"""The feed-forward half of blocks in slices of rows: the same results but for the order of sums, in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpu_service.domain.recomputation import Recomputation, everything, least_memory
from gpu_service.engine.fast_path import sliced_blocks
from gpu_service.engine.fast_path.frozen import FrozenGroup
from tests.fakes.fast_models import fast_gradients, hold_in_nf4, make_fast, make_peft, nats
from tests.fakes.flat_models import VOCABULARY_SIZE
from tests.fakes.planned_rows import PlannedRows, make_examples

_LAYERS = 2
# 460 tokens: slices of 128 rows cut through sequences, and the last one is short.
_LENGTHS = (150, 7, 1, 200, 102)
_SEED = 5


@pytest.fixture(scope="module")
def rows() -> PlannedRows:
    return PlannedRows(make_examples(_LENGTHS, vocabulary_size=VOCABULARY_SIZE, seed=3))


def _train(
    rows: PlannedRows, recomputation: Recomputation, *, dropout: float = 0.0, dtype: Any = torch.float32, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats of every example, and the gradient of all adapters end to end."""
    model = make_peft(dtype=dtype, **options)
    for module in model.modules():
        if hasattr(module, "lora_dropout") and dropout:
            module.lora_dropout["default"] = torch.nn.Dropout(dropout)
    fast = make_fast(model, dtype=dtype, recomputation=recomputation)
    fast.train()
    torch.manual_seed(_SEED)
    values = nats(fast, rows)
    gradients = fast_gradients(model, fast, values.sum() / 100)
    return values.detach(), torch.cat([one.flatten() for one in gradients.values()])


_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "head-norms": {"family": "qwen3"},
    "quantized": {"quantize": hold_in_nf4},
    "dropout": {"dropout": 0.3},
    "dropout-quantized": {"dropout": 0.3, "quantize": hold_in_nf4},
    "attention-alone": {"targets": ("q_proj", "v_proj")},
    "up-alone": {"targets": ("k_proj", "up_proj")},
    "down-alone": {"targets": ("down_proj",)},
}


@pytest.mark.parametrize("case", _CASES)
@pytest.mark.parametrize("slices", [2, 4])
def test_slices_change_the_order_of_sums_alone(case: str, slices: int, rows: PlannedRows) -> None:
    expected, expected_gradient = _train(rows, everything(_LAYERS), **_CASES[case])
    for recomputation in (
        everything(_LAYERS, feed_forward_slices=slices),
        everything(_LAYERS, feed_forward_slices=slices, offload=True),
        Recomputation(full_layers=1, elementwise_layers=1, feed_forward_slices=slices),
    ):
        found, gradient = _train(rows, recomputation, **_CASES[case])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert (gradient - expected_gradient).norm() <= 1e-6 * expected_gradient.norm()


@pytest.mark.parametrize("case", ["plain", "quantized", "dropout"])
def test_in_little_precision_slices_are_as_near_to_the_truth(case: str, rows: PlannedRows) -> None:
    """The weights are those of bfloat16 in either."""
    # So that both types have the same base to hold.
    exact = {"quantize": lambda base: _CASES[case].get("quantize", lambda same: same)(base.bfloat16().float())}
    _, truth = _train(rows, everything(_LAYERS), **{**_CASES[case], **exact})
    errors = [
        (_train(rows, way, dtype=torch.bfloat16, **_CASES[case])[1] - truth).norm() / truth.norm()
        for way in (everything(_LAYERS), everything(_LAYERS, feed_forward_slices=4))
    ]
    assert errors[1] <= 1.1 * errors[0]


@pytest.mark.parametrize("case", ["plain", "dropout-quantized"])
def test_what_is_made_again_is_what_was_made(case: str, rows: PlannedRows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: every slice's normed rows with their margin, gates, ups and gated rows."""
    seen: list[tuple[int, int, list[torch.Tensor]]] = []
    make = sliced_blocks._gate

    def watch(mlp_in: Any, mlp_out: Any, normed: torch.Tensor, *, adapted: bool) -> Any:
        made = make(mlp_in, mlp_out, normed, adapted=adapted)
        numbers = [normed, made[0][:, : 2 * mlp_out.in_features], made[1]]
        seen.append((mlp_in.number, mlp_in.dropout.first_row, [one.clone() for one in numbers]))
        return made

    monkeypatch.setattr(sliced_blocks, "_gate", watch)
    _train(rows, everything(_LAYERS, feed_forward_slices=4), dtype=torch.bfloat16, **_CASES[case])
    half = len(seen) // 2
    assert half == 4 * _LAYERS
    again = {(number, first): numbers for number, first, numbers in seen[half:]}
    for number, first, numbers in seen[:half]:
        assert all(torch.equal(*pair) for pair in zip(numbers, again[number, first], strict=True))


def test_what_is_measured_is_what_is_trained(rows: PlannedRows) -> None:
    fast = make_fast(make_peft(), recomputation=everything(_LAYERS, feed_forward_slices=3))
    trained = nats(fast, rows)
    with torch.no_grad():
        assert torch.equal(nats(fast, rows), trained)
    with torch.no_grad(), fast.disable_adapter():
        base = nats(fast, rows)
    plain = make_fast(make_peft())
    with torch.no_grad(), plain.disable_adapter():
        torch.testing.assert_close(base, nats(plain, rows), rtol=1e-6, atol=1e-6)
    assert (base - trained).abs().max() > 1e-3


def test_weights_are_restored_once_for_all_slices(rows: PlannedRows, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_peft(quantize=hold_in_nf4)
    fast = make_fast(model, recomputation=everything(_LAYERS, feed_forward_slices=4))
    groups = [one.frozen for block in fast.decoder.blocks for one in (block.mlp_in, block.mlp_out)]  # type: ignore[attr-defined]
    counts = dict.fromkeys(map(id, groups), 0)
    restore = FrozenGroup._restore

    def count(self: FrozenGroup, matrix: torch.Tensor) -> None:
        if id(self) in counts:
            counts[id(self)] += 1
        restore(self, matrix)

    monkeypatch.setattr(FrozenGroup, "_restore", count)
    fast_gradients(model, fast, nats(fast, rows).sum())
    # In the forward pass, and in the backward pass.
    assert set(counts.values()) == {2}
    # What they were restored into is gone, and no other matrix is as large.
    largest = max(group._shape[0] * group._shape[1] for group in groups)
    assert fast._scratch._buffer.numel() < largest
    assert all(group._held is None for group in groups)


def test_a_run_without_memory_goes_on_in_slices(rows: PlannedRows) -> None:
    model = make_peft(quantize=hold_in_nf4)
    fast = make_fast(model, recomputation=everything(_LAYERS, offload=True))
    expected = nats(fast, rows)
    gradients = fast_gradients(model, fast, expected.sum())
    reserved = fast._scratch._buffer.numel()
    assert fast.recompute_more() == least_memory(_LAYERS).describe(_LAYERS)
    found = nats(fast, rows)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for name, value in fast_gradients(model, fast, found.sum()).items():
        assert (value - gradients[name]).norm() <= 1e-5 * gradients[name].norm()
    assert fast._scratch._buffer.numel() < reserved
    assert fast.decoder.head.chunk_rows == 1024
    assert fast.recompute_more() == ""
