"""Answers on a CUDA device: an adapter over a quantized base, draws that come again, nothing left for the next run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpu_service.engine.request import DeviceChoice
from tests.fakes.engine_runs import Workspace, read_log
from tests.fakes.generations import InProcessEngine

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

_CUDA = {"type": "cuda", "index": 0}
QUESTION = "What is two plus two?"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> InProcessEngine:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return InProcessEngine(Workspace(root=tmp_path_factory.mktemp("node")))


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_an_adapter_answers_and_leaves_the_base_as_it_was(engine: InProcessEngine, quantization: str) -> None:
    import torch

    from gpu_service.engine import devices

    training_type = "lora" if quantization == "none" else "qlora"
    directory: Path = engine.workspace.make_run(
        f"asked-{quantization}",
        training_type=training_type,
        hyperparameters={"quantization": {"method": quantization}},
        device=_CUDA,
    )
    adapter = engine.train(directory)
    log = read_log(directory)
    assert log.states[-1] == "SUCCEEDED", log.payloads[-1]
    model = log.of("plan")[0]
    options: dict[str, Any] = {
        "model": "tiny/llama",
        "device": _CUDA,
        "quantization": quantization,
        "compute_dtype": model.resolved.quantization.compute_dtype,
    }
    before = torch.cuda.memory_allocated()
    greedy = engine.ask(QUESTION, adapter=adapter, **options)
    # The run's base, held in the same way.
    assert greedy.last["statistics"]["warm"] is True
    assert greedy.text != engine.ask(QUESTION, **options).text
    assert engine.ask(QUESTION, adapter=adapter, **options).text == greedy.text
    drawn = [engine.ask(QUESTION, adapter=adapter, temperature=1.0, seed=seed, **options).text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    # What cuBLAS keeps for its products is the process', and given back when an engine's memory is.
    devices.select(DeviceChoice(type="cuda", index=0)).give_back()
    assert torch.cuda.memory_allocated() <= before + 1024**2

    again = engine.workspace.make_run(
        f"again-{quantization}",
        training_type=training_type,
        hyperparameters={"quantization": {"method": quantization}},
        device=_CUDA,
    )
    engine.train(again)
    second = read_log(again)
    assert second.stage_details("WEIGHTS").get("resident") == "true"
    assert second.losses == pytest.approx(log.losses, rel=1e-3)
