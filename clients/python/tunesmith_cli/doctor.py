"""`tunesmith doctor`: what is installed here and whether a GPU service could train with it. Changes nothing."""

import json
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from tunesmith_cli.chores import DOCTOR_MODULE, module_output
from tunesmith_cli.exit_codes import ExitCode
from tunesmith_cli.output import Format, Output

# What the GPU service's own check does not name: the client needs no more than these.
CLIENT_DISTRIBUTIONS = ("tunesmith", "grpcio", "protobuf")


def installed_version(distribution: str) -> str:
    """The version, or `not installed`."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def doctor(
    output: Annotated[Format, typer.Option("--output", "-o", help="How results are written.")] = Format.TABLE,
) -> None:
    """Shows what is installed and checks it against what training needs and what is known to be broken."""
    out = Output(output)
    status, text = module_output(DOCTOR_MODULE, ["--output", "json"])
    report = json.loads(text)
    versions = {name: installed_version(name) for name in CLIENT_DISTRIBUTIONS} | report["versions"]
    if out.is_json:
        out.json({**report, "versions": versions})
    else:
        out.rows(("PACKAGE", "VERSION"), versions.items())
        for problem in report["problems"]:
            out.line(f"PROBLEM {problem['library']}: {problem['reason']}; pip install '{problem['install']}'")
        out.line("this machine can train" if report["ok"] else "this machine cannot train")
    raise typer.Exit(ExitCode.OK if status == 0 else ExitCode.FAILED)
