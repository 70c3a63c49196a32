"""The engine on a CUDA device: every method trains, memory comes back, and resuming goes on where it was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from gpu_service.catalog import optimizers
from tests.fakes.engine_runs import Workspace, read_log
from tests.fakes.tiny_models import TinyOptions
from tunesmith.common.v1 import training_spec_pb2

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

_CUDA = {"type": "cuda", "index": 0}
# What a resident base may differ by, in the contract's words.
_MEMORY_SLACK_BYTES = 64 * 1024 * 1024
_METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4": ("qlora", {}),
    "fp4": ("qlora", {"quantization": {"method": "fp4"}}),
    "int8": ("qlora", {"quantization": {"method": "int8"}}),
    "lora": ("lora", {}),
    "lora-float16": ("lora", {"quantization": {"compute_dtype": "float16"}}),
    "full": ("full", {"optimizer": {"learning_rate": 1e-3}}),
    "full-low": ("full", {"full_memory": "low", "optimizer": {"learning_rate": 1e-3}}),
    "full-reference": ("full", {"trainer": "reference", "optimizer": {"learning_rate": 1e-3}}),
    "gradient-checkpointing": ("qlora", {"gradient_checkpointing": True}),
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return Workspace(root=tmp_path_factory.mktemp("node"))


@pytest.fixture(scope="module")
def shelf() -> Any:
    from gpu_service.engine.resident import BaseShelf

    return BaseShelf()


def _carry_out(directory: Path, shelf: Any) -> Any:
    from gpu_service.engine.service import carry_out
    from gpu_service.engine.stopping import StopSwitch

    carry_out(directory, shelf=shelf, switch=StopSwitch(), notify=lambda notice: None)
    return read_log(directory)


@pytest.mark.parametrize("case", _METHODS)
def test_method_trains_and_gives_memory_back(case: str, workspace: Workspace, shelf: Any) -> None:
    import torch

    training_type, hyperparameters = _METHODS[case]
    directory = workspace.make_run(
        case,
        training_type=training_type,
        hyperparameters={"num_steps": 4, **hyperparameters},
        device=_CUDA,
        sample_prompts=[{"trait_type": "coding", "prompt": "What is 2 plus 2?", "max_new_tokens": 4}],
    )
    log = _carry_out(directory, shelf)

    assert log.states[-1] == "SUCCEEDED", log.payloads[-1]
    assert all(math.isfinite(loss) for loss in log.losses.values())
    assert len(log.losses) == 4
    (released,) = log.of("memory_released")
    assert torch.cuda.memory_allocated() <= released.resident_bytes + _MEMORY_SLACK_BYTES
    assert released.resident_bytes == shelf.describe().get("bytes", 0)
    assert log.of("step")[-1].peak_memory_bytes > 0


def test_bfloat16_is_the_default_where_there_is_one(workspace: Workspace, shelf: Any) -> None:
    import torch

    log = _carry_out(workspace.make_run("default", device=_CUDA), shelf)
    expected = "bfloat16" if torch.cuda.get_device_capability()[0] >= 8 else "float32"
    assert log.of("plan")[0].resolved.quantization.compute_dtype == expected


# Every optimizer of the catalog that names `cuda` is here: it is offered because this passes.
_RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    "qlora": ("qlora", {}),
    "lora": ("lora", {"lora": {"rank": 4, "dropout": 0.2}}),
    "adamw": ("full", {}),
    "adamw-8bit": ("full", {}),
    "paged-adamw-8bit": ("full", {}),
    "reference": ("full", {"trainer": "reference"}),
    "low": ("full", {"full_memory": "low"}),
}


@pytest.mark.parametrize("case", _RESUMED)
def test_resumed_training_goes_on(case: str, workspace: Workspace, shelf: Any) -> None:
    training_type, changes = _RESUMED[case]
    hyperparameters: dict[str, Any] = {"num_steps": 6, "save_every_steps": 2, "keep_checkpoints": 3, **changes}
    if training_type == "full":
        name = case if case in optimizers.REGISTRY else "adamw"
        hyperparameters["optimizer"] = {"name": name, "learning_rate": 1e-3}
    # Its embeddings are large enough to be paged.
    options = TinyOptions(vocabulary_size=4096)
    whole = workspace.make_run(
        f"{case}-whole", options=options, training_type=training_type, hyperparameters=hyperparameters, device=_CUDA
    )
    uninterrupted = _carry_out(whole, shelf)
    assert uninterrupted.states[-1] == "SUCCEEDED", uninterrupted.payloads[-1]
    rest = workspace.make_run(
        f"{case}-rest",
        options=options,
        training_type=training_type,
        hyperparameters=hyperparameters,
        device=_CUDA,
        attempt=2,
        resume=workspace.resume_point(whole, 4),
    )
    resumed = _carry_out(rest, shelf)

    assert resumed.states[-1] == "SUCCEEDED", resumed.payloads[-1]
    (event,) = resumed.of("resumed")
    # Within the tolerance that the engine itself allows between two measurements on a device.
    assert event.measured_probe_loss == pytest.approx(event.saved_probe_loss, abs=2e-2 * max(1, event.saved_probe_loss))
    assert sorted(resumed.losses) == [5, 6]
    # Kernels on a device may add in another order.
    for step, loss in resumed.losses.items():
        assert loss == pytest.approx(uninterrupted.losses[step], rel=1e-2)


def test_every_optimizer_of_the_catalog_is_resumed_here() -> None:
    offered = {name for name, entry in optimizers.REGISTRY.items() if "cuda" in entry.devices}
    assert offered <= _RESUMED.keys()


def test_paged_moments_are_paged_again_and_given_back() -> None:
    """bitsandbytes 0.50.2 by itself loads them into plain device memory, and never frees a page."""
    import gc

    import torch

    from gpu_service.engine.builders.optimizers import paged_adamw_8bit
    from gpu_service.engine.training import optimizer_state

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    settings = training_spec_pb2.Optimizer(learning_rate=1e-3, beta1=0.9, beta2=0.999, epsilon=1e-8)
    # A page of 64 MiB a moment.
    parameter = torch.nn.Parameter(torch.ones(8192, 8192, device="cuda"))
    parameter.grad = torch.ones_like(parameter)

    def use() -> str:
        first = paged_adamw_8bit.build([parameter], settings)
        first.step()
        state = optimizer_state.flatten(first)
        second = paged_adamw_8bit.build([parameter], settings)
        on_host = {name: tensor.cpu().clone() for name, tensor in state.tensors.items()}
        optimizer_state.load(second, state.document(), on_host)
        assert all(second.state[parameter][name].is_paged for name in ("state1", "state2"))
        assert optimizer_state.digest_of_optimizer(second) == optimizer_state.digest_of_optimizer(first)
        second.step()
        return optimizer_state.digest_of_optimizer(second)

    digest = use()
    gc.collect()
    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info()
    for _ in range(3):
        assert use() == digest
        gc.collect()
    torch.cuda.synchronize()
    after, _ = torch.cuda.mem_get_info()
    assert before - after < _MEMORY_SLACK_BYTES


@pytest.mark.parametrize("training_type", ["qlora", "lora"])
def test_merged_exports_are_compared_on_the_device(training_type: str, workspace: Workspace, shelf: Any) -> None:
    """Layer by layer from the disk to the device; afterwards it holds the base, and nothing of the export."""
    import torch

    directory = workspace.make_run(
        f"merged-{training_type}", training_type=training_type, hyperparameters={"exports": ["merged"]}, device=_CUDA
    )
    log = _carry_out(directory, shelf)
    assert log.states[-1] == "SUCCEEDED", log.payloads[-1]
    (export,) = log.of("export")
    assert export.accepted
    assert 0 < export.max_logit_difference < 0.05
    (released,) = log.of("memory_released")
    assert torch.cuda.memory_allocated() <= released.resident_bytes + _MEMORY_SLACK_BYTES
