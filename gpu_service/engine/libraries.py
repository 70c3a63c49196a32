"""Imports the libraries that the plain path, answers and saving need: together, once, when one of them is wanted.

The fast path trains without any of them. They take longer than all else of a start, so nothing of the engine imports
one at its top but modules that are loaded behind `need`.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from importlib import import_module

from gpu_service.engine.deferred_compile import compiling_at_first_call

# bitsandbytes before peft, which would import it by another way. transformers imports most of itself when a part is
# asked for: what the modules of the engine that work with it do, in the order that runs come to them.
_NAMES = (
    "bitsandbytes",
    "transformers",
    "accelerate",
    "peft",
    "gpu_service.engine.builders.families.llama",
    "gpu_service.engine.builders.methods.qlora",
    "gpu_service.engine.builders.quantization.nf4",
    "gpu_service.engine.artifacts",
    "gpu_service.engine.generation.service",
)


def need(after_each: Callable[[], None] = lambda: None) -> None:
    """Have them imported. `after_each` is called between two of them; what it raises ends the importing."""
    missing = [name for name in _NAMES if name not in sys.modules]
    if not missing:
        return
    # Of the millions of objects that imports make nearly all stay; looking for those that do not takes a fifth of the
    # time.
    collects = gc.isenabled()
    gc.disable()
    try:
        with compiling_at_first_call():
            for name in missing:
                # Each may take a minute from a slow disk, and is a sign of progress.
                import_module(name)
                after_each()
    finally:
        if collects:
            gc.enable()
