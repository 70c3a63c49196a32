"""Uses the imports of a new engine for the run that waits behind them: its planner works, and its device gets ready.

Has the first run planned that comes before the imports are over. Decides nothing of it, tells nothing, and fails
nothing: a stop meets the run when it is taken up, and what goes wrong here goes wrong again there, in the run's words.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from google.protobuf import json_format

from gpu_service.engine import request
from gpu_service.engine.spare_planner import PLANNER_COMMAND, SparePlanner

if TYPE_CHECKING:
    from gpu_service.engine.planning import Begun

_LOG = logging.getLogger(__name__)


class EarlyStart:
    """`begin` when imports begin, `offer` each run that comes, `end_imports`, `take` the run's plan, and `close`."""

    def __init__(
        self, *, device_id: str, planner: SparePlanner, planner_command: Sequence[str] = PLANNER_COMMAND
    ) -> None:
        """`device_id`: the engine's device (`cuda:0`), which is that of its runs; empty: nothing is begun early."""
        self._device_id = device_id
        self._planner = planner
        self._planner_command = planner_command
        self._lock = threading.Lock()
        self._offers: SimpleQueue[Path | None] = SimpleQueue()
        self._offered: Path | None = None
        self._imports_are_over = False
        self._begun: Begun | None = None
        # What prepares the device, if a run came in time for it.
        self.head_start: threading.Thread | None = None
        self._thread = threading.Thread(target=self._work, name="early-start", daemon=True)

    def begin(self) -> None:
        """From now on the imports are under way."""
        self._thread.start()

    def offer(self, run_directory: Path) -> None:
        """A run is to be carried out. Waits for nothing; called by the thread that hears of it."""
        with self._lock:
            if self._offered is None and not self._imports_are_over:
                self._offered = run_directory
                self._offers.put(run_directory)

    def torch_is_there(self) -> None:
        """The rest of the imports is the engine's own: a GPU may get ready beside it, if a run waits."""
        if self._offered is not None and self._device_id.startswith("cuda"):
            torch, head_start = import_module("torch"), import_module("gpu_service.engine.head_start")
            self.head_start = head_start.begin(torch.device(self._device_id))

    def end_imports(self) -> None:
        """Runs that come from now on are planned when they are taken up."""
        with self._lock:
            self._imports_are_over = True
            if self._offered is None:
                self._offers.put(None)

    def take(self, run_directory: Path) -> Begun | None:
        """The planner that works for this run, if one does; waits until that is known. Whoever takes it owns it."""
        if self._offered != run_directory:
            return None
        self._thread.join()
        begun, self._begun = self._begun, None
        return begun

    def close(self) -> None:
        """The engine leaves: a planner whose run it never took up is ended. Waits until that is known."""
        self.end_imports()
        self._thread.join()
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.end()

    def _work(self) -> None:
        if not self._device_id:
            return
        planning, facts = (import_module(f"gpu_service.engine.{name}") for name in ("planning", "device_facts"))
        expected = (OSError, ValueError, KeyError, json_format.ParseError, facts.DriverFailed)
        try:
            # Before there is a run: making the context takes as long as a part of the imports.
            kind, _, index = self._device_id.partition(":")
            describe = facts.open_device(request.DeviceChoice(type=kind, index=int(index)))
            _LOG.info("%s answers", self._device_id)
            run_directory = self._offers.get()
            if run_directory is None:
                return
            asked = request.read(run_directory)
            if planning.needs_planner(asked):
                device = {**describe(), "kernel_problem": ""}
                self._begun = planning.begin(asked, command=self._planner_command, device=device, spare=self._planner)
                _LOG.info("a planner works for %s", asked.job_id)
        except expected as error:
            _LOG.info("no early start: %s: %s", type(error).__name__, error)
