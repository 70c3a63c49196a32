"""Which trainer a plan takes, and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gpu_service.catalog import families
from gpu_service.domain.device import Device
from gpu_service.domain.errors import Refusal
from gpu_service.domain.plan import resolve
from gpu_service.domain.recomputation import everything
from gpu_service.domain.spec import TrainingSpec
from gpu_service.domain.trainer import adds_up_passes
from tests.fakes.checked_specs import CPU, hyper, make_base, plan

_H100 = Device(type="cuda", name="H100", total_memory_bytes=85_000_000_000, compute_capability="9.0")
_A100 = Device(type="cuda", name="A100", total_memory_bytes=85_000_000_000, compute_capability="8.0")
_T4 = Device(type="cuda", name="T4", total_memory_bytes=16_000_000_000, compute_capability="7.5")


def _decide(device: Device = _H100, *, spec: dict[str, Any] | None = None, base: Any = None, **values: Any) -> Any:
    checked = plan({**hyper(**values), **(spec or {})}, base or make_base(), device)
    return checked.hyperparameters.trainer, checked.trainer_reason


def test_adapters_over_known_families_take_the_fast_path() -> None:
    assert _decide(trainer="fast") == ("fast", "asked for")
    assert _decide(trainer="fast", spec={"training_type": "lora"})[0] == "fast"
    words: tuple[dict[str, Any], ...] = ({}, {"trainer": "auto"})
    for word in words:
        path, reason = _decide(**word)
        assert path == "fast"
        assert "nothing keeps" in reason
    path, reason = _decide(CPU)
    assert path == "reference"
    assert "for GPUs" in reason
    assert {name for name, entry in families.REGISTRY.items() if entry.has_fast_path} == {
        "llama",
        "code_llama",
        "mistral",
        "qwen2",
        "qwen3",
    }


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"quantization": {"method": "fp4"}}, "fp4"),
        ({"optimizer": {"name": "adamw-8bit"}}, "adamw-8bit"),
        ({"lora": {"dropout": 0.1, "rank": 65}}, "dropout"),
        ({"quantization": {"compute_dtype": "float16"}}, "float16"),
    ],
)
def test_what_it_cannot_train_goes_the_plain_way(changes: dict[str, Any], word: str) -> None:
    path, reason = _decide(**changes)
    assert path == "reference"
    assert word in reason
    with pytest.raises(Refusal) as refused:
        _decide(**changes, trainer="fast")
    assert refused.value.reason == "COMBINATION_NOT_ALLOWED"
    assert refused.value.field == "hyperparameters.trainer"
    assert word in str(refused.value)


def test_products_in_8_bits_are_for_those_who_ask() -> None:
    checked = plan(hyper(compute="fp8"), make_base(), _H100)
    assert checked.hyperparameters.trainer == "fast"
    assert checked.hyperparameters.compute == "fp8"
    assert checked.hyperparameters.base_weights == "resident"
    assert "other numerics" in checked.trainer_reason
    assert any("fp8" in warning and "other numerics" in warning for warning in checked.warnings)
    plain = plan(hyper(), make_base(), _H100)
    assert plain.hyperparameters.compute == "standard"
    assert not any("fp8" in warning for warning in plain.warnings)


@pytest.mark.parametrize(
    ("device", "changes", "word"),
    [
        (_A100, {}, "9.0"),
        (_H100, {"trainer": "reference"}, "reference"),
        (_H100, {"quantization": {"method": "fp4"}}, "fp4"),
        (_H100, {"quantization": {"compute_dtype": "float32"}}, "bfloat16"),
        (_H100, {"base_weights": "streamed"}, "restored at each use"),
    ],
)
def test_products_in_8_bits_are_refused_elsewhere(device: Device, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(Refusal) as refused:
        plan(hyper(compute="fp8", **changes), make_base(), device)
    assert refused.value.reason == "COMBINATION_NOT_ALLOWED"
    assert word in str(refused.value)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_dropout": 0.1}, "attention"),
        ({"sliding_window": 64}, "sliding window"),
        ({"partial_rotary_factor": 0.5}, "part of each head"),
    ],
)
def test_config_that_it_does_not_know(config: dict[str, Any], word: str) -> None:
    base = make_base()
    path, reason = _decide(base=make_base(config={**base.config, **config}))
    assert path == "reference"
    assert word in reason


def test_dropout_goes_the_fast_way() -> None:
    assert _decide(lora={"dropout": 0.1, "rank": 64})[0] == "fast"
    base = make_base()
    assert _decide(base=make_base(config={**base.config, "attention_dropout": 0.0}))[0] == "fast"


def test_window_that_no_example_reaches_is_none() -> None:
    base = make_base()
    config = {**base.config, "sliding_window": 64}
    assert _decide(base=make_base(config=config), max_length=64, trainer="fast")[0] == "fast"
    assert _decide(base=make_base(config={**config, "use_sliding_window": False}), trainer="fast")[0] == "fast"


def test_full_training_takes_the_fast_path() -> None:
    full = {"training_type": "full"}
    assert _decide(spec=full)[0] == "fast"
    checked = plan({**hyper(), **full}, make_base(), _H100)
    assert checked.hyperparameters.full_memory == "standard"
    assert plan({**hyper(), **full}, make_base(), CPU).hyperparameters.full_memory is None
    assert plan(hyper(full_memory="standard"), make_base(), _H100).hyperparameters.full_memory is None
    path, reason = _decide(spec=full, optimizer={"name": "adamw-8bit"})
    assert path == "reference"
    assert "adamw-8bit" in reason


def test_little_memory_is_for_those_who_ask() -> None:
    for device in (_H100, CPU):
        values = {"quantization": {"compute_dtype": "bfloat16"}}
        checked = plan({**hyper(full_memory="low", **values), "training_type": "full"}, make_base(), device)
        resolved = checked.hyperparameters
        assert (resolved.trainer, resolved.full_memory) == ("fast", "low")
        assert resolved.gradient_checkpointing
        assert resolved.recomputation == everything(2)
        assert "other numerics" in checked.trainer_reason
        assert "twice" in checked.memory_reason
        assert any("by chance" in warning for warning in checked.warnings)
        standard = plan({**hyper(trainer="fast", **values), "training_type": "full"}, make_base(), device)
        assert checked.kind_of_run != standard.kind_of_run
        assert not any("by chance" in warning for warning in standard.warnings)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"training_type": "lora"}, "adapter"),
        ({"trainer": "reference"}, "reference"),
        ({"quantization": {"compute_dtype": "float32"}}, "bfloat16"),
        ({"batch": {"examples": 4, "micro_batch_examples": 2}}, "one forward pass"),
        ({"batch": {"tokens": 8192, "micro_batch_tokens": 4096}}, "one forward pass"),
        ({"optimizer": {"name": "adamw-8bit"}}, "adamw-8bit"),
        ({"gradient_checkpointing": False}, "recomputes every layer"),
        ({"recomputation": {"full_layers": 1}}, "recomputes every layer"),
        ({"recomputation": {"offload": True}}, "on the device"),
    ],
)
def test_little_memory_is_refused_where_it_could_not_be_right(changes: dict[str, Any], word: str) -> None:
    changes = {"full_memory": "low", **changes}
    spec = {"training_type": changes.pop("training_type", "full")}
    with pytest.raises(Refusal) as refused:
        plan({**hyper(**changes), **spec}, make_base(), _H100)
    assert refused.value.reason == "COMBINATION_NOT_ALLOWED"
    assert word in str(refused.value)


@pytest.mark.parametrize(
    ("batch", "several"),
    [
        ({"examples": 8, "micro_batch_examples": 8}, False),
        ({"examples": 8, "micro_batch_examples": 4}, True),
        ({"examples": 8, "micro_batch_examples": 8, "micro_batch_tokens": 100}, True),
        ({"tokens": 100}, False),
        ({"tokens": 100, "micro_batch_tokens": 100}, False),
        ({"tokens": 100, "micro_batch_tokens": 50}, True),
        ({"tokens": 100, "micro_batch_examples": 3}, True),
    ],
)
def test_whether_passes_add_up(batch: dict[str, int], several: bool) -> None:
    names = ("examples", "tokens", "micro_batch_examples", "micro_batch_tokens")
    assert adds_up_passes(**{name: batch.get(name) for name in names}) is several
    # As a protobuf message has what is unset.
    assert adds_up_passes(**{name: batch.get(name, 0) for name in names}) is several


def test_a_device_without_bfloat16_is_refused() -> None:
    assert _decide(CPU, trainer="fast")[0] == "fast"
    assert "capability" in _decide(_T4)[1]
    with pytest.raises(Refusal):
        _decide(_T4, trainer="fast")


def test_an_older_gpu_trains_the_plain_way_in_float32() -> None:
    checked = plan(hyper(), make_base(), _T4, bitsandbytes="0.50.2")
    assert checked.hyperparameters.trainer == "reference"
    assert checked.hyperparameters.quantization.compute_dtype == "float32"
    # Its kernels are the fast path's.
    assert checked.quantizer == "bitsandbytes"
    half = plan(hyper(quantization={"compute_dtype": "float16"}), make_base(), _T4)
    assert half.hyperparameters.trainer == "reference"
    with pytest.raises(Refusal) as refused:
        plan(hyper(quantization={"compute_dtype": "bfloat16"}), make_base(), _T4)
    assert refused.value.reason == "DEVICE_UNSUPPORTED"


def test_a_node_that_cannot_compile_kernels_trains_the_plain_way() -> None:
    broken = replace(_H100, kernel_problem="RuntimeError: Failed to find C compiler")
    path, reason = _decide(broken)
    assert path == "reference"
    assert "Failed to find C compiler" in reason
    asked: tuple[dict[str, Any], ...] = ({"trainer": "fast"}, {"compute": "fp8"})
    for values in asked:
        with pytest.raises(Refusal, match="C compiler") as refused:
            _decide(broken, **values)
        assert refused.value.reason == "COMBINATION_NOT_ALLOWED"
    # Where kernels are references, nothing is compiled.
    assert replace(CPU, kernel_problem="none").has_kernels
    assert not _T4.has_kernels
    assert _A100.has_kernels


@pytest.mark.parametrize(
    ("device", "asked", "begun_by", "path"),
    [
        (_H100, None, "reference", "reference"),
        (_H100, "auto", "reference", "reference"),
        (_H100, None, "fast", "fast"),
        (_H100, None, "", "fast"),
        # What was asked for is asked for.
        (_H100, "fast", "reference", "fast"),
        (_H100, "reference", "fast", "reference"),
        # Where it cannot train, it cannot go on either.
        (_T4, None, "fast", "reference"),
        (CPU, None, "fast", "reference"),
    ],
)
def test_a_run_goes_on_by_the_trainer_that_began_it(
    device: Device, asked: str | None, begun_by: str, path: str
) -> None:
    given = hyper() if asked is None else hyper(trainer=asked)
    checked = resolve(TrainingSpec.from_json(given), make_base(), device, begun_by=begun_by)
    assert checked.hyperparameters.trainer == path
    fresh = resolve(TrainingSpec.from_json(given), make_base(), device)
    if fresh.hyperparameters.trainer != path:
        assert "goes on from" in checked.trainer_reason
    assert checked.spec_digest == fresh.spec_digest
    # Products in 8 bits are the fast path's alone, and were so when the run began.
    if device is _H100:
        fp8 = resolve(TrainingSpec.from_json(hyper(compute="fp8")), make_base(), device, begun_by="fast")
        assert fp8.hyperparameters.trainer == "fast"


def test_plain_way_may_be_asked_for() -> None:
    assert _decide(trainer="reference") == ("reference", "asked for")


def test_word_that_is_none() -> None:
    with pytest.raises(Refusal) as refused:
        _decide(trainer="quick")
    assert refused.value.reason == "INVALID_FIELD"
