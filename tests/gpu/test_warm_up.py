"""An engine that makes itself ready on a GPU: what it leaves there, and where adapters begin."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from tests.fakes.flat_models import make_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

_SLACK_BYTES = 64 * 1024 * 1024


@pytest.fixture(autouse=True)
def _on_a_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def test_a_warm_up_leaves_nothing_on_the_device(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    import torch

    from gpu_service.engine import warm_up
    from tests.fakes.tiny_models import TinyOptions, place

    caplog.set_level("INFO", logger=warm_up.__name__)
    gc.collect()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    model = tmp_path / place(tmp_path, TinyOptions(family="qwen3"))
    warm_up.make_ready("cuda:0", lambda: False, model)
    assert "warm after" in caplog.text
    assert "no kernels are compiled" not in caplog.text
    assert torch.cuda.memory_reserved() - held < _SLACK_BYTES


def test_an_adapter_is_drawn_on_its_device_by_the_seed() -> None:
    import torch

    from gpu_service.engine.builders.methods import lora
    from tunesmith.common.v1 import training_spec_pb2

    settings = training_spec_pb2.Hyperparameters(
        lora=training_spec_pb2.Lora(rank=8, alpha=16, target_modules=["q_proj", "down_proj"])
    )
    found = []
    for _ in range(2):
        base = make_model("llama", {}, torch.bfloat16).to("cuda")
        torch.manual_seed(3)
        model = lora.attach(base, "tiny/llama", settings)
        found.append({name: value for name, value in model.named_parameters() if value.requires_grad})
    assert found[0]
    for name, value in found[0].items():
        assert value.device.type == "cuda"
        assert value.dtype == torch.float32
        assert torch.equal(value, found[1][name])
        assert bool(value.any()) == ("lora_A" in name)
