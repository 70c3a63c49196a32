"""The command's entrance: assembles the commands and turns every outcome into an exit status. Does no work itself."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from tunesmith_cli.commands import artifacts, chat, datasets, jobs, models, nodes, projects, training
from tunesmith_cli.demo import command as demo
from tunesmith_cli.doctor import doctor, installed_version
from tunesmith_cli.exit_codes import ExitCode, exit_code_of
from tunesmith_cli.output import Format, Output
from tunesmith_cli.project_file import ProjectFileError
from tunesmith_cli.services import ServiceFailed
from tunesmith_cli.up import up
from tunesmith_client import TunesmithError

_MOST_VIOLATIONS = 10

app = typer.Typer(
    name="tunesmith",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Exit status: 0 ok; 1 the job or the demo failed; 2 wrong usage; 3 refused by the service; "
    "4 service unreachable; 130 Ctrl-C.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        Output(Format.TABLE).line(f"tunesmith {installed_version('tunesmith')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Fine-tunes language models through a pair of gRPC services."""


app.command("up")(up)
app.command("demo")(demo.demo)
app.command("doctor")(doctor)
app.add_typer(nodes.app, name="nodes")
app.add_typer(models.app, name="models")
app.add_typer(datasets.app, name="datasets")
app.add_typer(projects.app, name="projects")
app.add_typer(jobs.app, name="jobs")
app.add_typer(artifacts.app, name="artifacts")
training.add_to(app)
chat.add_to(app)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and gives its exit status."""
    out = Output(Format.TABLE)
    try:
        # Prints usage errors itself and exits: 2 for those, 130 for Ctrl-C, else what a command raised as typer.Exit.
        app(args=list(arguments) if arguments is not None else None, prog_name="tunesmith")
    except SystemExit as end:
        return int(end.code or 0)
    except ProjectFileError as error:
        out.remark(str(error), style="red")
        return ExitCode.USAGE
    except ServiceFailed as error:
        out.remark(str(error), style="red")
        return ExitCode.FAILED
    except OSError as error:
        # A file named on the command line that cannot be read or written.
        out.remark(str(error), style="red")
        return ExitCode.USAGE
    except TunesmithError as error:
        report_error(out, error)
        return exit_code_of(error)
    return ExitCode.OK


def report_error(out: Output, error: TunesmithError) -> None:
    """Prints an error with everything that helps to mend it."""
    out.remark(f"error: {error}", style="red")
    # What the message has said already is not said again.
    violations = [
        text
        for violation in error.field_violations
        if (text := f"{violation.field}: {violation.description}") not in error.message
        and violation.description != error.message
    ]
    for text in violations[:_MOST_VIOLATIONS]:
        out.remark(f"  {text}")
    if len(violations) > _MOST_VIOLATIONS:
        out.remark(f"  and {len(violations) - _MOST_VIOLATIONS} more")
    for name, value in sorted(error.metadata.items()):
        if value not in error.message:
            out.remark(f"  {name}: {value}")
    if exit_code_of(error) is ExitCode.UNREACHABLE:
        out.remark("  is a control service there? --address or TUNESMITH_ADDRESS says where; `tunesmith up` starts one")
    if error.retry_after_seconds is not None:
        out.remark(f"  try again in {error.retry_after_seconds:g} s")
    if error.request_id:
        out.remark(f"  request id: {error.request_id}")


def run() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    run()
