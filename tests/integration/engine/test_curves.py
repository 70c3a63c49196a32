"""Two hundred steps of the fast path and of transformers and PEFT: the same losses, and adapters that answer alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.fakes.curves import hold_same_curve, read_both, train_by_both
from tests.fakes.engine_runs import Workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

_TOKENS = torch.arange(4, 44)[None]


def _logits(base: Path, adapter: Path | None) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        return (model if adapter is None else PeftModel.from_pretrained(model, adapter))(_TOKENS).logits


@pytest.mark.parametrize(
    ("training_type", "compute_dtype"), [("qlora", "bfloat16"), ("qlora", "float32"), ("lora", "bfloat16")]
)
def test_a_long_run_is_that_of_the_plain_path(training_type: str, compute_dtype: str, workspace: Workspace) -> None:
    device = {"type": "cpu", "index": -1}
    directories = train_by_both(workspace, training_type=training_type, device=device, compute_dtype=compute_dtype)
    hold_same_curve(*read_both(directories))

    base = workspace.models_directory / "tiny/llama"
    fast, plain = (_logits(base, directory / "artifacts/adapter") for directory in directories)
    learned = (plain - _logits(base, None)).norm()
    assert (fast - plain).norm() <= 0.05 * learned
    assert learned > 1
