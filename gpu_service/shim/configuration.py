"""`engine.json`: what the server wants started. Refuses a file that does not say it all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_service.shim import durable_json

FILE_NAME = "engine.json"
# Of an engine that was started before there was a limit.
_HANG_LIMIT_SECONDS = 1800.0


class EngineDirectoryInvalid(Exception):
    """The engine directory has no usable `engine.json`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfiguration:
    """How to start an engine, and the times that hold for it."""

    # Without `--control-fd N`, which the shim adds.
    argv: tuple[str, ...]
    # Added to the shim's own environment.
    environment: Mapping[str, str]
    # `{"type": "cuda", "index": 0}`; whoever adopts the engine knows its device by it.
    device: Mapping[str, Any]
    # Without any server connection for this long, the engine is asked to checkpoint and end.
    orphan_limit_seconds: float
    # Grace for stops that name none.
    grace_seconds: float
    # Without progress of what it has in hand for this long, the engine is killed.
    hang_limit_seconds: float
    # A program that prints how many bytes of the device are held by nobody known; empty where memory is the processes'
    # own. And what it printed before the engine was started.
    device_memory_command: tuple[str, ...] = ()
    device_memory_bytes: int = 0

    @property
    def trains_in_host_memory(self) -> bool:
        """Whether the resident sets of its processes are what a run's end gives back. The memory of a GPU is the
        driver's, which takes it back when the process ends and which nobody here can ask.
        """
        return self.device.get("type") == "cpu"

    @classmethod
    def read(cls, directory: Path) -> EngineConfiguration:
        """Raises EngineDirectoryInvalid."""
        try:
            content = durable_json.read(directory / FILE_NAME)
        except (OSError, ValueError) as error:
            raise EngineDirectoryInvalid(f"{directory / FILE_NAME} cannot be read: {error}") from error
        if content is None:
            raise EngineDirectoryInvalid(f"{directory} has no {FILE_NAME}")
        try:
            return cls(
                argv=tuple(str(part) for part in content["argv"]),
                environment={str(name): str(value) for name, value in content["environment"].items()},
                device=dict(content["device"]),
                orphan_limit_seconds=float(content["limits"]["orphan_limit_seconds"]),
                grace_seconds=float(content["limits"]["grace_seconds"]),
                hang_limit_seconds=float(content["limits"].get("hang_limit_seconds", _HANG_LIMIT_SECONDS)),
                device_memory_command=tuple(str(part) for part in content.get("device_memory", {}).get("command", ())),
                device_memory_bytes=int(content.get("device_memory", {}).get("bytes", 0)),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EngineDirectoryInvalid(f"{directory / FILE_NAME} lacks or breaks a field: {error!r}") from error

    def write(self, directory: Path) -> None:
        """Raises OSError."""
        durable_json.write(
            directory / FILE_NAME,
            {
                "argv": list(self.argv),
                "environment": dict(self.environment),
                "device": dict(self.device),
                "limits": {
                    "orphan_limit_seconds": self.orphan_limit_seconds,
                    "grace_seconds": self.grace_seconds,
                    "hang_limit_seconds": self.hang_limit_seconds,
                },
                "device_memory": {"command": list(self.device_memory_command), "bytes": self.device_memory_bytes},
            },
        )
