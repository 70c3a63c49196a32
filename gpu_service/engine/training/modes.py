"""Evaluation mode for a model that goes on training.

bitsandbytes repacks a 4-bit layer on some CPUs when it runs in evaluation mode: the packed form has lost precision, has
no gradient, and is not undone when training goes on (0.50.2). Quantized layers therefore stay in training mode, which
changes nothing else in them; everything with a real evaluation mode, such as dropout, is in it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def measuring(model: Any) -> Iterator[None]:
    """No dropout and no gradients inside; afterwards every module's mode of before. May be entered again inside."""
    # Each module's own: after an inner use, one mode for all would put quantized layers into evaluation mode.
    before = [(module, module.training) for module in model.modules()]
    quantized = _quantized_layers()
    for module, _ in before:
        module.training = isinstance(module, quantized)
    try:
        # Not inference_mode: what a layer caches in there could never be part of a gradient.
        with torch.no_grad():
            yield
    finally:
        for module, was_training in before:
            module.training = was_training


def _quantized_layers() -> tuple[type, ...]:
    """None where bitsandbytes was never imported, which takes seconds: no model has its layers then."""
    if "bitsandbytes" not in sys.modules:
        return ()
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return (Linear4bit, Linear8bitLt)
