"""Who quantizes a base for answers where the fast path's kernels do not run: the library, as for training there."""

from __future__ import annotations

from typing import Any

import pytest

from gpu_service.engine import devices, loading
from gpu_service.engine.fast_path import kernel_problems
from gpu_service.engine.generation import service
from gpu_service.engine.resident import BaseShelf
from tests.fakes.engine_runs import Workspace
from tests.fakes.generations import InProcessEngine
from tests.fakes.tiny_models import TinyOptions


@pytest.mark.parametrize(
    ("capability", "problem", "quantizer"),
    [("7.5", "", "bitsandbytes"), ("8.0", "", "own"), ("9.0", "no compiler", "bitsandbytes")],
)
def test_who_quantizes_for_answers(
    capability: str, problem: str, quantizer: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU that says to be such a GPU."""
    told = {"type": "cuda", "name": "a card", "compute_capability": capability}
    monkeypatch.setattr(devices.CpuDevice, "describe", lambda device: told)
    monkeypatch.setattr(kernel_problems, "find_problem", lambda device: problem)
    seen: list[str] = []
    load = loading.load

    def note(request: Any, *rest: Any, **options: Any) -> None:
        seen.append(request.quantizer)
        load(request, *rest, **options)

    monkeypatch.setattr(service, "load", note)
    engine = InProcessEngine(workspace)
    engine.shelf = BaseShelf()
    answered = engine.ask("What is two plus two?", model=workspace.place_model(TinyOptions()), quantization="nf4")
    assert answered.last["finish_reason"] == "LENGTH"
    assert seen == [quantizer]
