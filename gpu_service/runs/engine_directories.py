"""The directories of engines: how an engine is started from one, and what its end left there.

Refuses to talk to a shim.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from gpu_service.devices import Device, DeviceMemory
from gpu_service.journal.failpoints import failpoint
from gpu_service.runs.run import Run
from gpu_service.runs.shim_client import spawn
from gpu_service.shim import durable_json
from gpu_service.shim.configuration import EngineConfiguration
from gpu_service.shim.records import EXIT_DISK_FULL, ExitRecord

ENGINE_ENVIRONMENT: Mapping[str, str] = {
    # Segments of torch's allocator grow in place: without it gaps between blocks take a part that no estimate knows.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    # NVML, which counted the devices, counts by bus id.
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    # Idle OpenMP threads sleep instead of spinning: where other processes want the cores too (both services do),
    # spinning makes a training step on the CPU take many times as long.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Triton keeps of a kernel what runs, and not what it was made from, which every process would read with it.
    "TRITON_STORE_BINARY_ONLY": "1",
}
# The device that an engine makes itself ready for, before it has a run: `cuda:0`.
DEVICE_VARIABLE = "TUNESMITH_ENGINE_DEVICE"
# The model whose tokenizer it may read meanwhile, and for whose sizes it compiles kernels.
MODEL_VARIABLE = "TUNESMITH_ENGINE_MODEL"
# Triton's.
_KERNELS_VARIABLE = "TRITON_CACHE_DIR"
# Directories of engines that ended, kept for their logs.
KEPT_ENDED_ENGINES = 8
_CONTEXT_FILE = "context.json"
_LOG_TAIL_BYTES = 2000
_LAST_WORDS_SECONDS = 2.0
# Of an engine that nobody saw end.
NO_ENDING = ExitRecord(status=None, signal=None, phase="", run_directory=None, stop_mode=None)


class EngineStartFailed(Exception):
    """No engine came up; `ending` says how it ended, with the end of its log."""

    def __init__(self, ending: ExitRecord) -> None:
        super().__init__(ending.note)
        self.ending = ending


@dataclass(kw_only=True, slots=True)
class RecentModel:
    """Directory of the base that the next run is likely to be on, as the last one was; empty when none is known."""

    directory: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """How engines are started, and how long they may take or wait."""

    command: tuple[str, ...]
    orphan_limit_seconds: float
    grace_seconds: float
    idle_seconds: float
    hang_limit_seconds: float
    # A shim answers at once; one that twice does not within this is broken.
    answer_limit_seconds: float = 30.0
    memory: DeviceMemory = field(default_factory=DeviceMemory)
    # Whether a device has an engine before a run wants one; None: a GPU has.
    spare_engines: int | None = 0
    # Where compiled kernels are kept, for engines to come; None: the compiler's own place.
    kernels_directory: Path | None = None
    recent_model: RecentModel = field(default_factory=RecentModel)

    def keeps_spare(self, device_id: str) -> bool:
        """Whether the device is to have an engine at all times that it can."""
        return device_id.startswith("cuda") if self.spare_engines is None else self.spare_engines > 0

    def environment(self, device: Device) -> dict[str, str]:
        """What an engine on the device is started with."""
        kernels = {} if self.kernels_directory is None else {_KERNELS_VARIABLE: str(self.kernels_directory)}
        model = {MODEL_VARIABLE: self.recent_model.directory} if self.recent_model.directory else {}
        return {**ENGINE_ENVIRONMENT, DEVICE_VARIABLE: device.id, **kernels, **model}

    @property
    def ask_seconds(self) -> float:
        """How often a shim is asked whether it lives."""
        return self.answer_limit_seconds / 3


def make(directory: Path, settings: EngineSettings, device: Device) -> subprocess.Popen[bytes]:
    """A new engine directory, and the shim started on it. Blocks for the exec and the driver. Raises OSError."""
    command = settings.memory.command(device)
    configuration = EngineConfiguration(
        argv=settings.command,
        environment=settings.environment(device),
        device={"type": device.type, "index": device.index},
        orphan_limit_seconds=settings.orphan_limit_seconds,
        grace_seconds=settings.grace_seconds,
        hang_limit_seconds=settings.hang_limit_seconds,
        device_memory_command=command,
        device_memory_bytes=settings.memory.held_bytes(device.index) if command else 0,
    )
    durable_json.make_directory(directory)
    try:
        configuration.write(directory)
        failpoint("spawn.before-shim")
        return spawn(directory)
    except OSError:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def needs_burial(directory: Path, runs: Mapping[str, Run]) -> bool:
    """Whether an engine whose shim is gone has no exit record, or a run that is not over. `runs` is by directory."""
    ending = ExitRecord.read(directory)
    if ending is None:
        return True
    run = runs.get(str(ending.run_directory))
    return run is not None and not run.is_over


def keep_context(directory: Path, num_bytes: int) -> None:
    """For a server to come: what the engine held of its device before it had any work. Blocks. Raises OSError."""
    durable_json.write(directory / _CONTEXT_FILE, {"context_bytes": num_bytes})


def read_context(directory: Path) -> int:
    """What `keep_context` kept; 0 where nobody measured it, or nobody can read it. Blocks."""
    try:
        content = durable_json.read(directory / _CONTEXT_FILE)
        return 0 if content is None else max(int(content["context_bytes"]), 0)
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def end_shim(process: subprocess.Popen[bytes]) -> int:
    """The exit status of a shim that does not answer; one that is on its way out says why first. Blocks."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(_LAST_WORDS_SECONDS)
    process.kill()
    return process.wait()


def ending_with_log(directory: Path, exit_status: int) -> ExitRecord:
    """How an engine ended that did not come up, whose shim ended with this status."""
    with (directory / "engine.log").open("rb") as log:
        log.seek(max(0, log.seek(0, 2) - _LOG_TAIL_BYTES))
        tail = log.read().decode(errors="replace")
    ending = ExitRecord.read(directory) or NO_ENDING
    note = f"the engine did not come up; its log ends with: {tail}"
    return replace(ending, disk_full=exit_status == EXIT_DISK_FULL, note=note)


def remove_ended(directory: Path, alive: set[str]) -> None:
    """Delete the directories of engines that ended, but for the newest. `alive` are names."""
    ended = [path for path in directory.iterdir() if path.name not in alive and (path / "exit.json").exists()]
    ended.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in ended[KEPT_ENDED_ENGINES:]:
        shutil.rmtree(path, ignore_errors=True)
