"""`tunesmith doctor`: what is installed here and whether it is known to work. Changes nothing."""

import platform
from importlib.metadata import PackageNotFoundError, version

import typer

from tunesmith_cli.chores import DOCTOR_MODULE, run_module
from tunesmith_cli.output import Format, Output

DISTRIBUTIONS = ("tunesmith", "grpcio", "protobuf", "torch", "transformers", "peft", "bitsandbytes", "accelerate")


def installed_version(distribution: str) -> str:
    """The version, or `not installed`."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def doctor() -> None:
    """Shows versions and devices, and checks them against the table of versions that are known to be broken."""
    out = Output(Format.TABLE)
    rows = [("python", platform.python_version())]
    rows += [(distribution, installed_version(distribution)) for distribution in DISTRIBUTIONS]
    out.rows(("PACKAGE", "VERSION"), rows)
    out.console.file.flush()
    raise typer.Exit(run_module(DOCTOR_MODULE, []))
