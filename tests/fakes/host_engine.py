"""The product's engine on the processor, whatever device its node gave it, failing where its run's directory says so.

Run as the engine's program. A file `fail` in a run's directory names one of FAILURES, which happens at the run's next
step; ways that a signal does need no file.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from gpu_service.engine import devices, service
from gpu_service.engine.entrypoint import main
from gpu_service.engine.request import DeviceChoice
from gpu_service.journal import Writer
from tests.fakes.failure_order import ORDER_FILE
from tunesmith.common.v1 import event_pb2


def _exit() -> None:
    os._exit(7)


def _raise() -> None:
    raise ArithmeticError("as it was asked")


def _lack_host_memory() -> None:
    raise MemoryError("as it was asked")


def _lack_device_memory() -> None:
    raise torch.OutOfMemoryError("as it was asked")


def _spoil_weights() -> None:
    for one in gc.get_objects():
        if isinstance(one, torch.nn.Parameter) and one.requires_grad:
            one.data.fill_(float("nan"))


FAILURES: Mapping[str, Callable[[], None]] = {
    "exit": _exit,
    "exception": _raise,
    "host-memory": _lack_host_memory,
    "device-memory": _lack_device_memory,
    "not-finite": _spoil_weights,
}


class _Orders:
    """Looks for the order at each step's event."""

    def __init__(self) -> None:
        self._append = Writer.append
        self._carry_out = service.carry_out
        self._order: Path | None = None

    def carry_out(self, run_directory: Path, **options: Any) -> Any:
        self._order = run_directory / ORDER_FILE
        return self._carry_out(run_directory, **options)

    def append(self, writer: Writer, payload: event_pb2.EventPayload) -> int:
        sequence = self._append(writer, payload)
        if payload.HasField("step") and self._order is not None and self._order.exists():
            order, self._order = self._order.read_text(), None
            FAILURES[order]()
        return sequence


def _patch() -> None:
    orders, select = _Orders(), devices.select
    devices.select = lambda choice: select(DeviceChoice(type="cpu"))
    service.carry_out = orders.carry_out
    Writer.append = lambda writer, payload: orders.append(writer, payload)  # type: ignore[assignment,method-assign]


if __name__ == "__main__":
    _patch()
    sys.exit(main(sys.argv[1:]))
