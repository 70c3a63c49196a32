"""The shim's one thread: passes messages between servers and engine, times stops, hangs and orphanhood, and ends the
engine.

Refuses to leave before every descendant is reaped, the exit record is on the disk and the run's journal says how it
ended.
"""

from __future__ import annotations

import os
import selectors
import signal
import time
from pathlib import Path
from typing import Any

from gpu_service.journal.failpoints import failpoint
from gpu_service.oom_counter import oom_kills
from gpu_service.shim import device_memory, process_tree, stacks
from gpu_service.shim.closing import has_begun, settle
from gpu_service.shim.hang_clock import Hang, HangClock
from gpu_service.shim.log import write_line
from gpu_service.shim.protocol import Channel, Message, ProtocolBroken
from gpu_service.shim.records import ExitRecord, ShimRecord
from gpu_service.shim.server_connections import ServerConnections
from gpu_service.shim.starting import Started
from gpu_service.shim.stop import Stop

_ENDING_TICK_SECONDS = 0.02
_IDLE_TICK_SECONDS = 60.0
# A process that was killed is gone by then, or by its grace, unless the kernel keeps it.
_MAX_DYING_SECONDS = 10.0
_LOG = Path("engine.log")


class Shim:
    """One engine's parent, from when it was started to the last of its descendants."""

    def __init__(self, started: Started) -> None:
        self._directory = started.directory
        self._configuration = started.configuration
        self._selector = started.selector
        self._signals = started.signals
        self._engine = started.engine
        self._oom_kills_at_start = started.oom_kills
        self._state = "starting"
        self._run_directory: str | None = None
        self._resident: dict[str, Any] = {}
        self._phase = ""
        self._stop: Stop | None = None
        self._clock = HangClock(limit_seconds=self._configuration.hang_limit_seconds)
        self._hang: Hang | None = None
        self._killed = False
        # Since when it is gone, or was killed and should be.
        self._dying_since: float | None = None
        # What the run in hand left behind is being ended for the engine, which waits for it.
        self._clearing = False
        # The engine was ready before it got the run in hand.
        self._was_ready = False
        self._shutting_down = False
        # Generations that the engine has, or that it ends over.
        self._generations: set[str] = set()
        # Wait status of the engine once it was reaped.
        self._ended: tuple[int | None, int | None] | None = None

    def run(self) -> int:
        """Run until the engine is gone; gives the exit code. Raises OSError when it cannot even be talked to."""
        self._servers = ServerConnections(self._selector, self._from_server)
        self._engine.listen(self._selector, self._engine_ready)
        failpoint("shim.before-record")
        self._write_record()
        self._log("started", engine_pid=self._engine.pid)
        while not self._all_ended():
            ready = self._selector.select(self._seconds_to_next_deadline())
            late_seconds = self._clock.wake_up(time.monotonic())
            if self._stop is not None:
                self._stop.postpone(late_seconds)
            for key, mask in ready:
                key.data(mask)
            self._check_deadlines()
        self._finish()
        return 0

    # Reaping.

    def _all_ended(self) -> bool:
        ended, any_left = process_tree.reap()
        for pid, status in ended:
            if pid == self._engine.pid:
                self._ended = self._engine.has_ended(status)
                self._state = "exited"
                self._dying_since = self._dying_since or time.monotonic()
                self._read_last_words()
        if self._ended is None:
            return False
        if any_left:
            process_tree.kill_children()
        return not any_left

    def _read_last_words(self) -> None:
        """What the engine said so far counts, also before its end."""
        if self._selector.get_map().get(self._engine.channel.connection.fileno()) is not None:
            while self._engine_ready(selectors.EVENT_READ):
                pass

    # Deadlines, all on the monotonic clock.

    def _seconds_to_next_deadline(self) -> float:
        if self._ended is not None:
            return _ENDING_TICK_SECONDS
        now = time.monotonic()
        deadlines = [now + (_ENDING_TICK_SECONDS if self._clearing else _IDLE_TICK_SECONDS)]
        if self._stop is not None:
            if not self._stop.killed:
                deadlines.append(self._stop.deadline)
        elif self._hang is None and self._clock.deadline is not None:
            deadlines.append(self._clock.deadline)
        if not self._servers.connected and not self._shutting_down:
            deadlines.append(self._servers.last_connected + self._configuration.orphan_limit_seconds)
        due = max(now, min(deadlines))
        self._clock.sleep_until(due, now)
        return due - now

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        hangs = self._clock.is_over(now)
        if self._ended is not None:
            return
        if self._clearing:
            self._clear()
        if self._signals.termination_requested and not self._shutting_down:
            self._shut_down(self._configuration.grace_seconds)
        if self._stop is not None and now >= self._stop.deadline and not self._stop.killed:
            self._log("grace-over", mode=self._stop.mode)
            self._stop.measure(self._tree_bytes())
            self._stop.killed = True
            self._kill_engine()
        elif hangs and self._stop is None and self._hang is None:
            # A stop has a grace of its own, which ends an engine that hangs.
            self._end_if_hanging(now)
        orphaned_since = self._servers.last_connected
        if (
            not self._servers.connected
            and not self._shutting_down
            and now >= orphaned_since + self._configuration.orphan_limit_seconds
        ):
            self._log("orphaned")
            self._shut_down(self._configuration.grace_seconds)

    def _end_if_hanging(self, now: float) -> None:
        # What it said while this process was waiting for a disk, say, has not been read yet.
        self._read_last_words()
        if not self._clock.is_over(now):
            return
        members = process_tree.tree(os.getpid())[1:]
        self._hang = Hang(
            idle_seconds=self._clock.idle_seconds(now),
            limit_seconds=self._clock.limit_seconds,
            stacks=stacks.capture(engine_pid=self._engine.pid, members=members, log=_LOG),
        )
        self._log("hang", idle_seconds=self._hang.idle_seconds, limit_seconds=self._hang.limit_seconds)
        self._kill_engine()

    def _kill_engine(self) -> None:
        self._killed = True
        self._dying_since = self._dying_since or time.monotonic()
        os.kill(self._engine.pid, signal.SIGKILL)

    def _clear(self) -> None:
        """End what the run in hand left of processes; the engine is told when none is left."""
        if process_tree.kill_descendants_but(self._engine.pid) == 0:
            self._clearing = False
            self._to_engine({"type": "run_cleared", "run_directory": self._run_directory})

    # Messages.

    def _from_server(self, message: Message, channel: Channel) -> None:
        kind = message["type"]
        if kind == "status":
            self._servers.send(channel, self._status())
        elif kind == "start_run":
            self._start_run(message)
        elif kind == "stop_run":
            self._stop_run(message)
        elif kind == "shutdown":
            self._shut_down(float(message["grace_seconds"]))
        elif kind == "generate":
            self._generate(message)
        elif kind == "cancel_generate":
            self._to_engine(message)
        else:
            self._log("unknown-message", message_type=kind)

    def _status(self) -> Message:
        return {
            "type": "status",
            "shim_pid": os.getpid(),
            "engine_pid": self._engine.pid,
            "state": self._state,
            "run_directory": self._run_directory,
            "resident": self._resident,
            "generations": sorted(self._generations),
            "stuck": self._stuck(),
        }

    def _stuck(self) -> str:
        """What is there although it was killed; empty when nothing is, or was not killed long ago."""
        patience_seconds = min(_MAX_DYING_SECONDS, self._configuration.grace_seconds)
        if self._dying_since is None or time.monotonic() - self._dying_since < patience_seconds:
            return ""
        return stacks.describe_stuck(process_tree.tree(os.getpid())[1:])

    def _start_run(self, message: Message) -> None:
        run_directory = str(message["run_directory"])
        if self._run_directory is not None or self._shutting_down or self._ended is not None:
            # The same run again is an answer lost on the way; another one is refused by the status that follows.
            self._log("start-ignored", run_directory=run_directory)
            return
        self._run_directory, self._phase, self._stop = run_directory, "", None
        self._was_ready = self._state == "idle"
        self._state = "busy"
        # On the disk first: whoever buries this engine must know the run.
        self._write_record()
        failpoint("shim.before-forward")
        self._clock.begin(time.monotonic())
        self._to_engine(message)

    def _generate(self, message: Message) -> None:
        """Passed on, and no more: a generation is no run, has no journal, and no record says that it was there."""
        if self._run_directory is not None or self._shutting_down or self._ended is not None:
            refusal = {"reason": "NODE_BUSY", "fault": "PLATFORM", "message": "the engine has a run, or is leaving"}
            self._servers.send_all(
                {"type": "generated", "generation": message["generation"], "done": True, "failure": refusal}
            )
            return
        if not self._generations:
            self._clock.begin(time.monotonic())
        self._generations.add(str(message["generation"]))
        self._to_engine(message)

    def _stop_run(self, message: Message) -> None:
        if self._run_directory is None or message["run_directory"] != self._run_directory or self._ended is not None:
            return
        mode, grace_seconds = str(message["mode"]), float(message["grace_seconds"])
        if not self._begin_stop(mode, grace_seconds):
            return
        self._to_engine(message)

    def _begin_stop(self, mode: str, grace_seconds: float) -> bool:
        if self._stop is None:
            self._stop = Stop(mode=mode, grace_seconds=grace_seconds)
        elif not self._stop.tighten(mode=mode, grace_seconds=grace_seconds):
            return False
        self._stop.measure(self._tree_bytes())
        self._write_record()
        return True

    def _shut_down(self, grace_seconds: float) -> None:
        if self._ended is not None:
            return
        again, self._shutting_down = self._shutting_down, True
        if self._begin_stop("checkpoint", grace_seconds) or not again:
            self._to_engine({"type": "shutdown", "grace_seconds": grace_seconds})

    def _to_engine(self, message: Message) -> None:
        try:
            self._engine.send(message)
        except (OSError, ProtocolBroken) as error:
            # It is about to be reaped, or the stop's deadline ends it.
            self._log("engine-does-not-read", error=str(error))

    def _engine_ready(self, mask: int) -> bool:
        """Handle what the engine sent; False when there is nothing more."""
        channel = self._engine.channel
        try:
            if mask & selectors.EVENT_WRITE:
                channel.flush()
            messages = channel.receive() if mask & selectors.EVENT_READ else []
        except OSError:
            messages = None
        except ProtocolBroken as error:
            # An engine that does not keep to the protocol cannot be stopped in order either.
            self._log("engine-broke-protocol", error=str(error))
            self._kill_engine()
            messages = None
        if messages is None:
            self._selector.unregister(channel.connection)
            return False
        for message in messages:
            self._from_engine(message)
        if self._ended is None:
            self._engine.watch_writes()
        return bool(messages)

    def _from_engine(self, message: Message) -> None:
        kind = message["type"]
        now = time.monotonic()
        self._clock.note_progress(now, next_pause_seconds=float(message.get("next_pause_seconds", 0)))
        if kind == "alive":
            return
        if kind == "clear_run":
            self._clearing = True
            self._clear()
            return
        if kind == "ready":
            self._state = "busy" if self._run_directory is not None else "idle"
        elif kind == "phase":
            self._phase = str(message["phase"])
            self._clock.begin(now)
        elif kind == "generated":
            self._note_generated(message)
        elif kind == "run_finished":
            self._resident = dict(message.get("resident") or {})
            self._run_directory, self._phase = None, ""
            self._state = "idle"
            self._stand_still()
            if not self._shutting_down:
                self._stop = None
            self._write_record()
        self._servers.send_all(message)

    def _note_generated(self, message: Message) -> None:
        if "resident" in message:
            self._resident = dict(message["resident"] or {})
        if message.get("done") and not message.get("ends_engine"):
            self._generations.discard(str(message["generation"]))
            self._stand_still()

    def _stand_still(self) -> None:
        if self._run_directory is None and not self._generations:
            self._clock.end()

    # The end.

    def _finish(self) -> None:
        assert self._ended is not None
        status, signal_number = self._ended
        # A stop without a run is only the end of an idle engine.
        stop = self._stop if self._run_directory is not None else None
        # A generation that took the engine with it must not cost the run behind it an attempt: that never began.
        stop_mode = stop.mode if stop else "checkpoint" if self._run_directory and self._generations else None
        hang = self._hang
        ending = ExitRecord(
            status=status,
            signal=signal_number,
            phase=self._phase,
            run_directory=None if self._never_began(stop_mode) else self._run_directory,
            stop_mode=stop_mode,
            out_of_memory=signal_number == signal.SIGKILL
            and not self._killed
            and oom_kills() > self._oom_kills_at_start,
            freed_bytes=stop.freed_bytes(self._tree_bytes()) if stop else 0,
            seconds=stop.seconds() if stop else 0.0,
            idle_seconds=hang.idle_seconds if hang else 0.0,
            hang_limit_seconds=hang.limit_seconds if hang else 0.0,
            stacks=hang.stacks if hang else stacks.of_crash(signal_number, _LOG),
            held_bytes=device_memory.held_bytes(self._configuration),
        )
        sequence = settle(self._directory, ending, self._log)
        if sequence is not None:
            self._servers.send_all({"type": "journal", "run_directory": self._run_directory, "run_sequence": sequence})
        self._servers.send_all({"type": "engine_exited", "status": status, "signal": signal_number})
        self._servers.close()

    def _never_began(self, stop_mode: str | None) -> bool:
        """Whether a run met an idle engine on its way out: the server takes it to another, and it is not over."""
        if self._run_directory is None or stop_mode is not None or self._hang is not None or not self._was_ready:
            return False
        return not has_begun(Path(self._run_directory))

    def _tree_bytes(self) -> int:
        """Memory that the engine and its descendants hold, where it can be told; else 0."""
        if not self._configuration.trains_in_host_memory:
            return 0
        return process_tree.resident_bytes(process_tree.tree(os.getpid()))

    def _write_record(self) -> None:
        shim = process_tree.facts(os.getpid())
        ShimRecord(
            shim_pid=os.getpid(),
            shim_start_time=shim.start_time if shim else 0,
            engine_pid=self._engine.pid,
            engine_start_time=self._engine.start_time,
            run_directory=self._run_directory,
            stop_mode=self._stop.mode if self._stop is not None and self._run_directory is not None else None,
        ).write(self._directory)

    def _log(self, event: str, **fields: Any) -> None:
        write_line(event, self._run_directory, **fields)
