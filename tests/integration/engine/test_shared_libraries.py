"""The linker loads torch's libraries before torch is imported, and torch finds them: fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from gpu_service import torch_build

pytestmark = pytest.mark.timeout(120)

_PROGRAM = """
import json, os, sys
from gpu_service.engine.shared_libraries import TORCH_LIBRARIES, load_ahead

def is_loaded():
    return "libtorch_cpu.so" in open("/proc/self/maps").read()

told = {"before": is_loaded()}
load_ahead(LIBRARIES).join()
told |= {"after": is_loaded(), "imported": "torch" in sys.modules}
import torch
told["sum"] = torch.ones(8, 8).matmul(torch.ones(8, 8)).sum().item()
print(json.dumps(told))
"""


def _ask(libraries: str) -> dict[str, Any]:
    program = _PROGRAM.replace("LIBRARIES)", f"{libraries})")
    said = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True, timeout=100)
    told: dict[str, Any] = json.loads(said.stdout)
    return told


def test_they_are_there_before_torch_is() -> None:
    assert _ask("TORCH_LIBRARIES") == {"before": False, "after": True, "imported": False, "sum": 512.0}


def test_one_that_is_not_there_ends_it_and_torch_is_imported_all_the_same() -> None:
    told = _ask('(("libnothing.so", os.RTLD_NOW), *TORCH_LIBRARIES)')
    assert told == {"before": False, "after": False, "imported": False, "sum": 512.0}


def test_what_torch_is_built_for_is_told_by_its_files() -> None:
    assert torch_build.has_cuda() is (torch.version.cuda is not None)
