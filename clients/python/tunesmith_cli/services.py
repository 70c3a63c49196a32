"""The two services as child processes: started in order, waited for by their ready files, stopped in order.

Children are exec'd with this interpreter, each in a process group of its own, so that Ctrl-C reaches them only through
`stop`. Knows their flags, nothing of their insides.
"""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from tunesmith_cli.chores import CONTROL_MODULE, GPU_MODULE, module_command

NODE_NAME = "local"
# The longest orderly stop: engines get their own grace (30 s) to checkpoint, then the server closes.
STOP_SECONDS = 60.0
READY_SECONDS = 120.0
_POLL_SECONDS = 0.05

LineSink = Callable[[str, str], None]


class ServiceFailed(Exception):
    """A service did not start or ended by itself; the message has its name, exit status and last lines."""


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """Where the pair listens and keeps its data. Port 0 picks a free one."""

    data_directory: Path
    models_directory: Path
    control_address: str = "127.0.0.1:50051"
    gpu_address: str = "127.0.0.1:50052"


class ServiceProcess:
    """One service as a child process. Its output goes line by line to `sink` with its name."""

    def __init__(self, name: str, command: Sequence[str], *, ready_file: Path, sink: LineSink) -> None:
        self.name = name
        self._ready_file = ready_file
        self._sink = sink
        self._last_lines: list[str] = []
        ready_file.parent.mkdir(parents=True, exist_ok=True)
        # Left by a service that was killed: it must not pass for this one.
        ready_file.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            [*command, "--ready-file", str(ready_file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        assert self._process.stdout is not None, "a piped process has a stdout"
        self._reader = threading.Thread(
            target=self._read_lines, args=(self._process.stdout,), name=f"{name}-output", daemon=True
        )
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def wait_ready(self, *, stopped: threading.Event, limit_seconds: float = READY_SECONDS) -> str:
        """The address that the service serves at. Raises ServiceFailed when it ends or takes too long."""
        ends_at = time.monotonic() + limit_seconds
        while not self._ready_file.exists():
            status = self._process.poll()
            if status is not None:
                raise ServiceFailed(self.ended_text())
            if stopped.is_set():
                raise KeyboardInterrupt
            if time.monotonic() > ends_at:
                raise ServiceFailed(f"{self.name} was not ready after {limit_seconds:.0f} s\n{self._tail()}")
            stopped.wait(_POLL_SECONDS)
        address: str = json.loads(self._ready_file.read_text(encoding="utf-8"))["address"]
        return address

    def wait(self) -> int:
        """Blocks until the process has ended, and gives its exit status."""
        return self._process.wait()

    def status(self) -> int | None:
        """Exit status; None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """Kills the server process at once, as a crash would; what it left running is not touched."""
        self._process.kill()
        self._process.wait()

    def kill_group(self) -> int:
        """Kills the process and whatever it started in its own group, and gives its exit status."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()

    def stop(self, *, limit_seconds: float = STOP_SECONDS) -> int:
        """Asks the process to end, kills its group after the limit, and gives its exit status."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            status = self.kill_group()
        # A grandchild may hold the pipe for longer than the service lived; its lines are not waited for.
        self._reader.join(1.0)
        return status

    def ended_text(self) -> str:
        """That it ended by itself, how, and what it said last."""
        status = self._process.poll()
        how = f"was killed by signal {-status}" if status is not None and status < 0 else f"exited with status {status}"
        self._reader.join(1.0)
        return f"{self.name} {how}\n{self._tail()}"

    def _read_lines(self, stream: IO[bytes]) -> None:
        for raw in stream:
            line = raw.decode("utf-8", "replace").rstrip("\n")
            self._last_lines = [*self._last_lines[-19:], line]
            self._sink(self.name, line)

    def _tail(self) -> str:
        return "\n".join(f"  {line}" for line in self._last_lines)


class Pair:
    """Both services. A context manager: whatever happens inside, both are stopped at the end, the GPU service first."""

    def __init__(self, config: PairConfig, *, sink: LineSink, stopped: threading.Event | None = None) -> None:
        self.config = config
        self.stopped = stopped or threading.Event()
        self._sink = sink
        self._processes: list[ServiceProcess] = []
        self.address = ""
        self.gpu_address = ""

    def __enter__(self) -> Self:
        try:
            self.gpu_address = self.start_gpu().wait_ready(stopped=self.stopped)
            self.address = self.start_control().wait_ready(stopped=self.stopped)
        except BaseException:
            # Also on Ctrl-C between the two starts: no child may be left behind.
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start_gpu(self) -> ServiceProcess:
        """Starts the GPU service; on a restart, at the address that it had."""
        arguments = [
            *("--name", NODE_NAME),
            *("--address", self.gpu_address or self.config.gpu_address),
            *("--data-directory", str(self.config.data_directory / f"node-{NODE_NAME}")),
            *("--models-directory", str(self.config.models_directory)),
        ]
        return self._start("gpu", module_command(GPU_MODULE, arguments))

    def start_control(self) -> ServiceProcess:
        """Starts the control service, told of the GPU service's address; on a restart, at the address that it had."""
        arguments = [
            *("--address", self.address or self.config.control_address),
            *("--data-directory", str(self.config.data_directory / "control")),
            *("--node", f"{NODE_NAME}={self.gpu_address}"),
        ]
        return self._start("control", module_command(CONTROL_MODULE, arguments))

    @property
    def control(self) -> ServiceProcess:
        """The control service that was started last."""
        return self._newest("control")

    @property
    def gpu(self) -> ServiceProcess:
        """The GPU service that was started last."""
        return self._newest("gpu")

    def stop(self) -> list[int]:
        """Stops whatever runs, the GPU service first: control still hears how its runs ended. Gives exit statuses."""
        order = sorted(self._processes, key=lambda process: process.name != "gpu")
        try:
            return [process.stop() for process in order]
        except KeyboardInterrupt:
            # Asked a second time: no more waiting, but nothing is left behind either.
            for process in order:
                process.kill_group()
            raise

    def wait_for_end(self) -> ServiceProcess | None:
        """Blocks until one service ends (gives it), or `stopped` is set (gives None)."""
        ended: list[ServiceProcess] = []

        def watch(process: ServiceProcess) -> None:
            process.wait()
            ended.append(process)
            self.stopped.set()

        for process in self._processes:
            threading.Thread(target=watch, args=(process,), name=f"{process.name}-end", daemon=True).start()
        self.stopped.wait()
        return ended[0] if ended else None

    def _start(self, name: str, command: Sequence[str]) -> ServiceProcess:
        ready_file = self.config.data_directory / "run" / f"{name}.json"
        process = ServiceProcess(name, command, ready_file=ready_file, sink=self._sink)
        self._processes.append(process)
        return process

    def _newest(self, name: str) -> ServiceProcess:
        return next(process for process in reversed(self._processes) if process.name == name)


@contextlib.contextmanager
def stop_on_signals(stopped: threading.Event) -> Iterator[None]:
    """While inside, SIGINT and SIGTERM set `stopped` instead of ending the process."""
    with _handling((signal.SIGINT, signal.SIGTERM), lambda *_: stopped.set()):
        yield


@contextlib.contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """While inside, SIGTERM unwinds as Ctrl-C does, so that children are stopped on the way out."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    with _handling((signal.SIGTERM,), interrupt):
        yield


@contextlib.contextmanager
def _handling(numbers: Sequence[signal.Signals], handler: Callable[[int, Any], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
