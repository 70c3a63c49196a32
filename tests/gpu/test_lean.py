"""The fast path's own model on a GPU, against the libraries': tensors, first weights, a step's loss and gradient."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]


@pytest.fixture(autouse=True)
def _on_a_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def _load(directory: Path, family: str, *, is_lean: bool, resident: Any = None) -> Any:
    import torch

    from gpu_service.catalog import families, methods, quantization
    from gpu_service.engine.lean import choice
    from gpu_service.engine.lean.builders import Builders
    from gpu_service.engine.loading import Loaded, LoadRequest, load
    from gpu_service.engine.loading.work import HeldBase
    from gpu_service.engine.stopping import StopSwitch
    from tests.fakes.fast_models import ALL_SEVEN
    from tunesmith.common.v1 import plan_pb2, training_spec_pb2

    class Silent:
        loading_stage = ""

        def emit(self, message: object) -> None:
            pass

    settings = training_spec_pb2.Hyperparameters(
        quantization=training_spec_pb2.Quantization(method="nf4", double_quantization=True, compute_dtype="bfloat16"),
        lora=training_spec_pb2.Lora(rank=8, alpha=16, target_modules=ALL_SEVEN),
        seed=11,
    )
    plan = plan_pb2.Plan(resolved=settings, num_covered_linears=14, model_type=family, quantizer="own")
    made_with = choice.builders(plan)
    if not is_lean:
        made_with = Builders(
            family=import_module(families.REGISTRY[family].builder),
            quantization=import_module(quantization.REGISTRY["nf4"].builder),
            method=import_module(methods.REGISTRY["qlora"].builder),
        )
    request = LoadRequest(
        model_directory=directory,
        base_model="org/name",
        weights_digest="",
        plan=plan,
        is_lean=is_lean,
        compute_dtype=torch.bfloat16,
        device=torch.device("cuda:0"),
        quantizer="own",
        resident=None if resident is None else HeldBase(model=resident),
        **vars(made_with),
    )
    assert not is_lean or choice.fits(request)
    loaded = Loaded()
    load(request, loaded, switch=StopSwitch(), reporter=Silent())
    return loaded


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_lean_model_trains_as_the_libraries_model(family: str, tmp_path: Path) -> None:
    import torch

    from gpu_service.engine.lean import method
    from tests.fakes.fast_models import make_fast, nats
    from tests.fakes.planned_rows import PlannedRows, make_examples
    from tests.fakes.tiny_models import TinyOptions, place

    directory = tmp_path / place(tmp_path, TinyOptions(family=family, tied=True))
    rows = PlannedRows(make_examples((5, 40, 17, 64), vocabulary_size=512, seed=3))
    found = []
    for is_lean in (True, False):
        loaded = _load(directory, family, is_lean=is_lean)
        trained = {name: value for name, value in loaded.model.named_parameters() if value.requires_grad}
        assert all(value.device.type == "cuda" for value in loaded.model.parameters())
        drawn = {name: value.detach().clone() for name, value in trained.items()}
        fast = make_fast(loaded.model, device="cuda:0", dtype=torch.bfloat16)
        values = nats(fast, rows, device="cuda:0")
        values.sum().backward()
        assert fast.adapter.grad is not None
        found.append((drawn, values.detach(), fast.adapter.grad))
        fast.release()
        if is_lean:
            base = method.detach(loaded.model)
            held = {value.data_ptr() for value in base.parameters() if value.dtype == torch.uint8}
            taken = _load(directory, family, is_lean=False, resident=base)
            assert held <= {value.data_ptr() for value in taken.model.parameters()}
    (drawn, values, gradient), (expected_drawn, expected_values, expected_gradient) = found
    assert list(drawn) == list(expected_drawn)
    for name, value in expected_drawn.items():
        assert torch.equal(drawn[name], value), name
    assert torch.equal(values, expected_values)
    # Attention adds gradients of queries in any order.
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-2, atol=1e-4)
