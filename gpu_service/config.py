"""Settings of the GPU server: declared once, read from flags and TUNESMITH_GPU_* variables, then frozen.

Refuses what it does not know: a misspelled variable with our prefix is an error, not a silent default.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

ENVIRONMENT_PREFIX = "TUNESMITH_GPU_"


class SettingsInvalid(Exception):
    """A flag or variable is wrong; the message names it."""


class Settings(BaseSettings):
    """Everything that an operator can turn. A flag wins over a variable, a variable over the default."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, frozen=True, extra="forbid")

    address: str = Field(
        "127.0.0.1:50052", pattern=r"^.+:[0-9]{1,5}$", description="host:port to listen on; port 0 picks a free one"
    )
    name: str = Field("local", pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", description="the node's name")
    data_directory: Path = Field(
        Path(), description="the node's own directory; one server at a time (default ./data/node-<name>)"
    )
    models_directory: Path = Field(Path("data/models"), description="base models, as <org>/<name>")
    keep_engines: bool = Field(False, description="leave engines training when the server stops in order")
    engine_idle_seconds: float = Field(600.0, ge=0, description="how long an idle engine keeps its base in memory")
    spare_engines: int | None = Field(
        None,
        ge=0,
        le=1,
        description="1: a device without work has an engine that a run need not wait for; 0: engines start with runs "
        "(default 1 for GPUs, 0 for a CPU)",
    )
    orphan_limit_seconds: float = Field(
        1800.0, gt=0, description="how long an engine trains on without any server before it checkpoints and ends"
    )
    grace_seconds: float = Field(30.0, gt=0, description="how long an engine may take to stop before it is killed")
    hang_limit_seconds: float = Field(
        1800.0, gt=0, description="how long an engine may make no progress before it is killed, and the run tried again"
    )
    shim_answer_seconds: float = Field(
        30.0, gt=0, description="a shim that twice does not answer within this is ended, with its engine"
    )
    cache_max_bytes: int = Field(
        20 * 1024**3,
        ge=0,
        description="blobs, plans, tokens and copies of weights beyond this are deleted, the longest unused first",
    )
    stalled_reader_seconds: float = Field(
        60.0, gt=0, le=3600, description="a caller that takes nothing of a stream for this long is cut off"
    )
    ready_file: Path | None = Field(None, description="written with address and pid once the service serves")
    engine_command: tuple[str, ...] = Field(
        (sys.executable, "-m", "gpu_service.engine"),
        min_length=1,
        description="program of the engine; the shim adds --control-fd N. For tests: a JSON list in the variable",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_data_directory(cls, values: dict[str, Any]) -> dict[str, Any]:
        if "data_directory" not in values:
            values["data_directory"] = Path("data") / f"node-{values.get('name', 'local')}"
        return values

    @field_validator("data_directory", "models_directory", "ready_file")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        # Children get these paths and run elsewhere.
        return path.absolute() if path is not None else None


def load(arguments: Sequence[str]) -> Settings:
    """Settings from flags and the environment. Raises SettingsInvalid; argparse ends the process on an unknown flag."""
    known = {ENVIRONMENT_PREFIX + name.upper() for name in Settings.model_fields}
    unknown = sorted(
        name for name in os.environ if name.upper().startswith(ENVIRONMENT_PREFIX) and name.upper() not in known
    )
    if unknown:
        raise SettingsInvalid(f"unknown environment variables: {', '.join(unknown)}")
    flags = vars(_parser().parse_args(arguments))
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**given)
    except (ValidationError, SettingsError) as error:
        raise SettingsInvalid(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tunesmith-gpu",
        description="The GPU service: loads models, trains, and streams progress to a control service.",
        epilog=f"Each flag can also be set as {ENVIRONMENT_PREFIX}<NAME>. Exit codes: 0 after a clean stop, 2 for bad "
        "settings, 3 when the port or data directory is taken.",
    )
    for name, field in Settings.model_fields.items():
        flag = "--" + name.replace("_", "-")
        if field.annotation is bool:
            parser.add_argument(flag, action="store_const", const=True, help=field.description)
        elif name == "engine_command":
            parser.add_argument(flag, nargs="+", metavar="WORD", help=field.description)
        else:
            parser.add_argument(flag, help=f"{field.description}{_default_note(field.default)}")
    return parser


def _default_note(default: Any) -> str:
    return f" (default {default})" if default not in (None, Path()) else ""
