"""What compiles kernels by launching them does so in one thread at a time: a head start's beside the run's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpu_service.engine.fast_path import kernel_problems, quantizing
from gpu_service.engine.fast_path.operations import first_launches

_CUDA = torch.device("cuda")


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """At each launch, whether another thread would wait. Tensors of the GPU lie on the CPU."""
    found: list[bool] = []

    def launch(*arguments: Any, **options: Any) -> None:
        found.append(first_launches.locked())

    kernels = SimpleNamespace(prepare_copies=lambda copies: copies, copy_out=launch)
    monkeypatch.setattr(kernel_problems, "operations_for", lambda device: kernels)
    monkeypatch.setattr(quantizing, "quantize_values", launch)
    monkeypatch.setattr(quantizing, "quantize_scales", launch)
    for name in ("empty", "zeros"):
        make = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *sizes, make=make, **options: make(*sizes, **{**options, "device": "cpu"})
        )
    return found


def test_what_quantizes_is_compiled_by_one_thread(held: list[bool]) -> None:
    tables: Any = SimpleNamespace(codes=SimpleNamespace(device=_CUDA))
    quantizing.make_ready(tables, torch.bfloat16)
    assert held == [True, True]
    assert not first_launches.locked()


def test_a_first_kernel_is_compiled_by_one_thread(held: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_problems.find_problem(_CUDA) == ""
    assert held == [True]
    assert not first_launches.locked()

    def fail(device: torch.device) -> Any:
        raise ImportError("no triton")

    monkeypatch.setattr(kernel_problems, "operations_for", fail)
    assert kernel_problems.find_problem(_CUDA)
    assert not first_launches.locked()
