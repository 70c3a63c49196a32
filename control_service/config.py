"""Settings of the control service: declared once, read from flags, then from the environment. Opens nothing."""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

ENVIRONMENT_PREFIX: Final = "TUNESMITH_CONTROL_"
_ADDRESS: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+):(?P<port>[0-9]{1,5})")
_NODE: Final = re.compile(r"(?P<name>[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)=(?P<address>.+)")
_GIBIBYTE: Final = 1024**3


class SettingsError(ValueError):
    """A setting is unknown or not legal. The text names it."""


@dataclass(frozen=True, kw_only=True)
class NodeAddress:
    """A node to dial from the start."""

    name: str
    address: str

    def __str__(self) -> str:
        return f"{self.name}={self.address}"


class Settings(BaseSettings):
    """Each field is the flag `--like-this` and the variable `TUNESMITH_CONTROL_LIKE_THIS`; a flag goes first."""

    model_config = SettingsConfigDict(frozen=True, env_prefix=ENVIRONMENT_PREFIX, extra="forbid")

    address: str = Field("127.0.0.1:50051", description="host:port to serve on; port 0 picks a free one")
    data_directory: Path = Field(Path("data/control"), description="database and blobs; one process at a time")
    output_root: Path | None = Field(None, description="where artifacts go; default <data-directory>/output")
    import_root: Path | None = Field(None, description="directory whose files may be registered as datasets by name")
    node: Annotated[tuple[NodeAddress, ...], NoDecode] = Field(
        (NodeAddress(name="local", address="127.0.0.1:50052"),),
        description="name=host:port of a GPU service; repeatable, or separated by commas in the environment",
    )
    ready_file: Path | None = Field(None, description="file to write address and pid to once the service serves")
    grace_seconds: float = Field(10.0, ge=0, le=3600, description="time that open calls get when the service stops")
    allow_insecure_address: bool = Field(
        False, description="serve beyond loopback although calls are neither encrypted nor authenticated"
    )
    log_level: str = Field("info", pattern="debug|info|warning|error", description="debug, info, warning or error")
    max_dataset_bytes: int = Field(16 * _GIBIBYTE, ge=1, description="largest dataset that is taken in")
    max_dataset_reads: int = Field(
        2, ge=1, le=64, description="most dataset files that are read at once; others wait in order"
    )
    max_watches: int = Field(4096, ge=1, le=4096, description="most watches of jobs at once")
    heartbeat_seconds: float = Field(15.0, gt=0, le=3600, description="a quiet watch gets a heartbeat this often")
    upload_idle_seconds: float = Field(60.0, gt=0, le=3600, description="a silent upload is cut off after this long")
    stalled_reader_seconds: float = Field(
        60.0, gt=0, le=3600, description="a caller that takes nothing of a stream for this long is cut off"
    )
    node_lease_seconds: float = Field(30.0, gt=0, le=3600, description="a silent node is unreachable after this long")
    node_heartbeat_seconds: float = Field(5.0, gt=0, le=600, description="how often nodes are asked to report")
    release_runs: bool = Field(True, description="let nodes delete what control has of jobs that are over")
    replicate_checkpoint_max_bytes: int = Field(
        _GIBIBYTE // 2, ge=0, description="largest checkpoint that is copied into control's store; 0: none"
    )

    event_retention_days: float = Field(
        0.0, ge=0, le=36500, description="events of jobs over for longer are deleted, but for the last; 0: never"
    )

    @property
    def output_directory(self) -> Path:
        """The output root that holds."""
        return self.output_root if self.output_root is not None else self.data_directory / "output"

    @field_validator("node", mode="before")
    @classmethod
    def _nodes(cls, value: object) -> object:
        """Takes `name=host:port` texts, in a list or separated by commas."""
        texts = value.split(",") if isinstance(value, str) else value
        if not isinstance(texts, Sequence) or isinstance(texts, bytes):
            raise ValueError("must be name=host:port")
        nodes = tuple(_node(text) for text in texts if text != "")
        if len({node.name for node in nodes}) != len(nodes):
            raise ValueError("names a node twice")
        return nodes

    @field_validator("address")
    @classmethod
    def _address_is_whole(cls, value: str) -> str:
        _checked_address(value)
        return value

    @model_validator(mode="after")
    def _address_is_safe(self) -> Settings:
        host = _checked_address(self.address)
        if not self.allow_insecure_address and not _is_loopback(host):
            raise ValueError(
                f"address {self.address} is not loopback, and calls are neither encrypted nor authenticated; "
                "set allow_insecure_address if the network is yours"
            )
        return self


def load_settings(argv: Sequence[str]) -> tuple[Settings, bool]:
    """(settings, whether only to print them). SettingsError for what is unknown or not legal; argparse exits for
    flags that it does not know."""
    known = {ENVIRONMENT_PREFIX + name.upper() for name in Settings.model_fields}
    unknown = sorted(key for key in os.environ if key.upper().startswith(ENVIRONMENT_PREFIX) and key not in known)
    if unknown:
        raise SettingsError(f"unknown variables in the environment: {', '.join(unknown)}")
    flags = vars(_parser().parse_args(list(argv)))
    print_only = flags.pop("print_config")
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None}), print_only
    except ValidationError as error:
        raise SettingsError("\n".join(_named(item) for item in error.errors())) from error


def as_text(settings: Settings) -> Mapping[str, Any]:
    """Every setting with its value, as plain JSON."""
    values = {name: getattr(settings, name) for name in Settings.model_fields}
    values["output_root"] = settings.output_directory
    return {name: _plain(value) for name, value in values.items()}


def _named(item: Mapping[str, Any]) -> str:
    """A validation error as `setting: what is wrong`; one of several settings together has no name in front."""
    place = ".".join(str(part) for part in item["loc"])
    text = str(item["msg"]).removeprefix("Value error, ")
    return f"{place}: {text}" if place else text


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return [str(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tunesmith-control", description="The control service of Tunesmith.")
    for name, declared in Settings.model_fields.items():
        options: dict[str, Any] = {"dest": name, "default": None, "help": declared.description}
        if declared.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif name == "node":
            options |= {"action": "append", "metavar": "NAME=HOST:PORT"}
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    parser.add_argument("--print-config", action="store_true", help="print the settings as JSON and exit")
    return parser


def _node(value: object) -> NodeAddress:
    if isinstance(value, NodeAddress):
        return value
    match = _NODE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r} is not name=host:port")
    _checked_address(match["address"])
    return NodeAddress(name=match["name"], address=match["address"])


def _checked_address(value: str) -> str:
    match = _ADDRESS.fullmatch(value)
    if match is None or int(match["port"]) > 65535:
        raise ValueError(f"{value!r} is not host:port")
    return match["host"].strip("[]")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        # A name may resolve to anything.
        return False
