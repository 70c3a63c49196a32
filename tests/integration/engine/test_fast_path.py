"""The fast path against transformers and PEFT in float32 on a CPU: losses, every gradient, curves and what is saved."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gpu_service.domain.quantizer import LIBRARY
from gpu_service.domain.recomputation import Recomputation
from gpu_service.engine.builders.optimizers import adamw
from gpu_service.engine.fast_path import nf4, quantizing, torch_reference
from gpu_service.engine.fast_path.adapters import AdapterNotSupported
from gpu_service.engine.fast_path.flat_adamw import FlatAdamW
from gpu_service.engine.training import optimizer_state
from gpu_service.engine.training.batches import MicroBatchLimit
from tests.fakes.fast_models import (
    ALL_SEVEN,
    fast_gradients,
    hold_in_nf4,
    make_fast,
    make_peft,
    nats,
    plain_gradients,
)
from tests.fakes.flat_models import LENGTHS, VOCABULARY_SIZE, make_model
from tests.fakes.planned_rows import PlannedRows, make_example, make_examples
from tunesmith.common.v1 import training_spec_pb2

_LLAMA_3 = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama3-scaling": ("llama", _LLAMA_3),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}
_TARGETS = {
    "all": ALL_SEVEN,
    "attention": ("q_proj", "v_proj"),
    "middle": ("k_proj", "up_proj"),
    "outputs": ("o_proj", "down_proj"),
}


@pytest.fixture(scope="module")
def rows() -> PlannedRows:
    return PlannedRows(make_examples(LENGTHS, vocabulary_size=VOCABULARY_SIZE, seed=3))


def _weighted(by_sequence: torch.Tensor) -> torch.Tensor:
    """A loss to which every sequence counts differently, as no mean does."""
    return (by_sequence * torch.linspace(0.5, 2.0, len(by_sequence), dtype=by_sequence.dtype)).sum() / 100


def _compare(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], tolerance: float) -> None:
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        apart = (found[name] - gradient).abs().max() / gradient.abs().max()
        assert apart <= tolerance, f"{name}: {apart:.2e}"


def _check_parity(model_of: Any, rows: PlannedRows, tolerance: float = 1e-5, **settings: Any) -> None:
    reference = model_of()
    expected = nats(reference, rows)
    expected_gradients = plain_gradients(reference, _weighted(expected))
    model = model_of()
    fast = make_fast(model, **settings)
    found = nats(fast, rows)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    _compare(expected_gradients, fast_gradients(model, fast, _weighted(found)), tolerance)


@pytest.mark.parametrize("case", _MODELS)
def test_losses_and_gradients_are_those_of_the_plain_path(case: str, rows: PlannedRows) -> None:
    family, extras = _MODELS[case]
    _check_parity(lambda: make_peft(family, extras), rows)


@pytest.mark.parametrize("case", _TARGETS)
def test_any_of_the_seven_linears_may_be_trained(case: str, rows: PlannedRows) -> None:
    _check_parity(lambda: make_peft(targets=_TARGETS[case]), rows)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("keeps_weights", [True, False])
def test_base_in_nf4(double: bool, keeps_weights: bool, rows: PlannedRows) -> None:
    _check_parity(
        lambda: make_peft(quantize=lambda base: hold_in_nf4(base, double=double)), rows, keeps_weights=keeps_weights
    )


def test_library_restores_beside_a_version_that_was_not_compared(
    rows: PlannedRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nf4, "TESTED_VERSIONS", ())
    own = pytest.fail
    monkeypatch.setattr(torch_reference, "nf4_dequantize", lambda *arguments: own("not the library"))
    assert nf4.name_quantizer() == LIBRARY
    _check_parity(lambda: make_peft(quantize=hold_in_nf4), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double", [True, False])
def test_weights_are_restored_to_the_same_bits(dtype: torch.dtype, double: bool) -> None:
    from bitsandbytes.functional import dequantize_4bit

    base = hold_in_nf4(make_model("llama", {}, dtype), double=double)
    for linear in (base.model.layers[0].mlp.down_proj, base.model.layers[1].self_attn.k_proj):
        # Rows that lie apart, as in the fused matrix.
        out = torch.full((linear.out_features + 3, linear.in_features + 5), 7.0, dtype=dtype)
        nf4.Nf4Weight.of(linear).restore(out[: linear.out_features, : linear.in_features])
        expected = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
        assert torch.equal(out[: linear.out_features, : linear.in_features], expected)
        assert (out[linear.out_features :] == 7).all()
        assert (out[:, linear.in_features :] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_quantized_to_the_same_bits(dtype: torch.dtype) -> None:
    """But for the places of scales: on a CPU the library's table misses the nearest one now and then."""
    from bitsandbytes.functional import quantize_4bit

    generator = torch.Generator().manual_seed(2)
    weight = (torch.randn(384, 192, generator=generator) * 0.02).to(dtype)
    weight[5, :64] = 0
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    found: Any = quantizing.quantize(weight, double=True)
    assert torch.equal(found.packed, packed)
    assert torch.equal(found.nested_scales, state.state2.absmax)
    assert torch.equal(found.offset, state.offset)
    assert torch.equal(quantizing.nested_codes(weight.device), state.state2.code)
    assert (found.scales.int() - state.absmax.int()).abs().max() <= 1
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
    found = quantizing.quantize(weight, double=False)
    assert torch.equal(found.packed, packed)
    assert torch.equal(found.scales, state.absmax)


_RECOMPUTATIONS = {
    "elementwise": Recomputation(elementwise_layers=2),
    "feed-forward": Recomputation(feed_forward_layers=1, elementwise_layers=1),
    "one-layer": Recomputation(full_layers=1),
    "whole": Recomputation(full_layers=2),
    "offloaded": Recomputation(full_layers=4, offload=True),
    "offloaded-in-part": Recomputation(full_layers=3, feed_forward_layers=1, offload=True),
}


@pytest.mark.parametrize("case", _RECOMPUTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", [None, hold_in_nf4])
def test_recomputing_changes_nothing(case: str, dtype: torch.dtype, quantize: Any, rows: PlannedRows) -> None:
    """Not a bit, and not in a second pass either."""
    layers = {"num_hidden_layers": 5} if case.startswith("offloaded") else {}
    found: list[list[torch.Tensor]] = []
    for recomputation in (Recomputation(), _RECOMPUTATIONS[case]):
        model = make_peft("qwen3", layers, quantize=quantize, dtype=dtype)
        fast = make_fast(model, dtype=dtype, recomputation=recomputation)
        found.append([])
        for limit in (None, MicroBatchLimit(examples=3)):
            values = nats(fast, rows, limit)
            if limit is not None:
                # A pass that failed leaves what it had put away behind.
                nats(fast, rows)
                values = nats(fast, rows)
            found[-1] += [values, *fast_gradients(model, fast, _weighted(values)).values()]
    assert all(torch.equal(before, after) for before, after in zip(*found, strict=True))


def test_passes_of_any_size_add_up(rows: PlannedRows) -> None:
    model = make_peft()
    fast = make_fast(model)
    whole = nats(fast, rows)
    single = nats(fast, rows, MicroBatchLimit(examples=1))
    torch.testing.assert_close(whole, single, rtol=1e-5, atol=1e-5)
    _compare(
        fast_gradients(model, fast, _weighted(whole)), fast_gradients(model, fast, _weighted(single)), tolerance=1e-5
    )


def test_examples_do_not_see_each_other() -> None:
    examples = make_examples(LENGTHS, vocabulary_size=VOCABULARY_SIZE, seed=3)
    others = make_examples(LENGTHS, vocabulary_size=VOCABULARY_SIZE, seed=4)
    fast = make_fast(make_peft())
    before = nats(fast, PlannedRows(examples))
    after = nats(fast, PlannedRows([*examples[:5], others[5], *examples[6:]]))
    assert torch.equal(before[:5], after[:5])
    assert torch.equal(before[6:], after[6:])
    assert before[5] != after[5]


def test_pass_without_a_target_costs_nothing() -> None:
    model = make_peft()
    fast = make_fast(model)
    found = nats(fast, PlannedRows([make_example([3, 4, 5], [0, 0, 0]), make_example([6])]))
    assert found.tolist() == [0, 0]
    assert all(not gradient.any() for gradient in fast_gradients(model, fast, found.sum()).values())


def test_without_its_adapter_it_is_the_base(rows: PlannedRows) -> None:
    model = make_peft()
    fast = make_fast(model)
    with fast.disable_adapter(), torch.no_grad():
        found = nats(fast, rows)
    with model.disable_adapter(), torch.no_grad():
        expected = nats(model, rows)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_model_beside_it_stays_right(rows: PlannedRows) -> None:
    """What is sampled, saved and exported is the PEFT model, whose tensors the fast path changes in place."""
    model = make_peft()
    fast = make_fast(model)
    with torch.no_grad():
        fast.adapter.mul_(1.5)
        torch.testing.assert_close(nats(model, rows), nats(fast, rows), rtol=1e-5, atol=1e-5)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.5)
        torch.testing.assert_close(nats(fast, rows), nats(model, rows), rtol=1e-5, atol=1e-5)
    fast.release()
    fast.release()
    base = model.unload()
    assert all(parameter.is_contiguous() for parameter in base.parameters())
    fresh = make_model("llama", {})
    names = dict(fresh.named_parameters())
    assert all(torch.equal(parameter, names[name]) for name, parameter in base.named_parameters())


def test_what_was_held_in_another_type_is_so_again(rows: PlannedRows) -> None:
    model = make_peft(dtype=torch.bfloat16)
    embedding = model.base_model.model.model.embed_tokens.weight
    embedding.data = embedding.data.float()
    before = embedding.data.clone()
    fast = make_fast(model, dtype=torch.bfloat16)
    assert embedding.dtype is torch.bfloat16
    assert torch.isfinite(nats(fast, rows)).all()
    fast.release()
    assert torch.equal(embedding.data, before)


_SETTINGS = training_spec_pb2.Optimizer(
    learning_rate=1e-3, beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.1, max_gradient_norm=1.0
)


def _steps(model: Any, optimizer: Any, parameters: list[Any], rows: PlannedRows, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = nats(model, rows).sum() / 100
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, _SETTINGS.max_gradient_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


def _trained(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_curve_and_optimizer_are_those_of_the_plain_path(rows: PlannedRows) -> None:
    reference = make_peft()
    trained = _trained(reference)
    plain_optimizer = adamw.build(trained.values(), _SETTINGS)
    expected = _steps(reference, plain_optimizer, list(trained.values()), rows, 20)
    model = make_peft()
    fast = make_fast(model)
    optimizer = FlatAdamW(fast.flat_adapter, _SETTINGS)
    found = _steps(fast, optimizer, [fast.adapter], rows, 20)
    assert expected[-1] < expected[0] - 0.1
    assert found == pytest.approx(expected, rel=1e-4)
    for name, parameter in _trained(model).items():
        torch.testing.assert_close(parameter, trained[name], rtol=1e-2, atol=1e-4)
    ours, theirs = optimizer_state.flatten(optimizer), optimizer_state.flatten(plain_optimizer)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert ours.document().keys() == theirs.document().keys()
    assert ours.groups[0] == theirs.groups[0]
    for name, tensor in theirs.tensors.items():
        torch.testing.assert_close(ours.tensors[name].cpu(), tensor, rtol=1e-2, atol=1e-4)


def test_going_on_from_saved_state_is_exact(rows: PlannedRows) -> None:
    def begin() -> tuple[Any, Any, Any]:
        model = make_peft()
        fast = make_fast(model)
        return model, fast, FlatAdamW(fast.flat_adapter, _SETTINGS)

    model, fast, optimizer = begin()
    _steps(fast, optimizer, [fast.adapter], rows, 4)
    state = optimizer_state.flatten(optimizer)
    saved = {name: tensor.clone() for name, tensor in optimizer_state.apart(state.tensors).items()}
    document = json.loads(json.dumps(state.document()))
    weights = {name: parameter.detach().clone() for name, parameter in _trained(model).items()}
    digest = optimizer_state.digest_of_optimizer(optimizer)
    expected = _steps(fast, optimizer, [fast.adapter], rows, 4)

    model, fast, optimizer = begin()
    with torch.no_grad():
        for name, parameter in _trained(model).items():
            parameter.copy_(weights[name])
    optimizer_state.load(optimizer, document, saved)
    assert optimizer_state.digest_of_optimizer(optimizer) == digest
    assert _steps(fast, optimizer, [fast.adapter], rows, 4) == expected


def test_what_it_does_not_train_is_refused() -> None:
    base = make_model("llama", {})
    for options in ({"lora_bias": True}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}):
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], **options)
        with pytest.raises(AdapterNotSupported):
            make_fast(get_peft_model(copy.deepcopy(base), config))
