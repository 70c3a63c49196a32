"""Measuring leaves every module in the mode it had, also when it is done within another."""

from __future__ import annotations

import torch
from bitsandbytes.nn import Linear4bit

from gpu_service.engine.training.modes import measuring


def test_quantized_layers_never_see_evaluation_mode() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), Linear4bit(64, 64))
    model.train()
    model[0].eval()
    with measuring(model):
        assert [module.training for module in model] == [False, False, True]
        with measuring(model):
            assert not torch.is_grad_enabled()
        # bitsandbytes repacks a 4-bit layer for good that runs in evaluation mode.
        assert [module.training for module in model] == [False, False, True]
        assert not torch.is_grad_enabled()

    assert [module.training for module in model] == [False, True, True]
    assert torch.is_grad_enabled()
