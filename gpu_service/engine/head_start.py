"""Uses the time in which a run is planned and its base is read, and in a new process that in which the rest of the
engine is imported: a thread prepares the device for what any step needs.

Decides nothing, and fails nothing: what goes wrong here goes wrong again where the run needs it, in the run's words.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gpu_service.engine.fast_path import kernel_problems
from gpu_service.engine.fast_path.operations import operations_for
from gpu_service.engine.fast_path.quantizing import Tables, make_ready

_LOG = logging.getLogger(__name__)
_SIDE = 256


def begin(device: torch.device) -> threading.Thread | None:
    """Have a thread prepare a GPU; None for a CPU, where nothing is to be prepared."""
    if device.type != "cuda":
        return None
    thread = threading.Thread(target=_prepare, args=(device,), name="head-start")
    thread.start()
    return thread


@contextmanager
def preparing(device: torch.device, begun: threading.Thread | None = None) -> Iterator[None]:
    """Inside, a thread prepares a GPU, if it was not `begun` before; it is done when this ends. Who wants kernels
    compiled meanwhile waits for those that it compiles.
    """
    thread = begun or begin(device)
    try:
        yield
    finally:
        if thread is not None:
            thread.join()


def _prepare(device: torch.device) -> None:
    """The context, the library that multiplies, and Triton with the fast path's kernels."""
    try:
        # A new thread has the first device, whatever the engine's is.
        if torch.cuda.is_available():
            torch.cuda.set_device(device)
        one = torch.ones(_SIDE, _SIDE, device=device, dtype=torch.bfloat16)
        (one @ one).sum().item()
        operations_for(device)
        # Triton itself gets ready at the first kernel that is launched.
        make_ready(Tables.on(device), torch.bfloat16)
    except _expected() as error:
        _LOG.info("no head start: %s: %s", type(error).__name__, error)


def _expected() -> tuple[type[Exception], ...]:
    """Asked when something was raised: what Triton raises is known once it is imported."""
    return (RuntimeError, ImportError, OSError, AssertionError, *kernel_problems.errors())
