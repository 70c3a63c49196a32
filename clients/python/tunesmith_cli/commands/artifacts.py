"""`tunesmith artifacts`: what jobs left."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from tunesmith.common.v1 import event_pb2
from tunesmith_cli.commands.training import show_started
from tunesmith_cli.session import Session, command
from tunesmith_cli.text import byte_count, moment
from tunesmith_client import TransferProgress

app = typer.Typer(help="What jobs left: adapters, models, exports, reports.", no_args_is_help=True)

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="adapter, model, merged or report.")]


@command(app, "list")
def list_artifacts(session: Session, job: JobArgument) -> None:
    """Lists a job's artifacts."""
    artifacts = session.client.artifacts.list(job)
    rows = (
        (
            artifact.name,
            event_pb2.ArtifactKind.Name(artifact.kind).removeprefix("ARTIFACT_KIND_"),
            len(artifact.files),
            byte_count(artifact.size_bytes),
            artifact.path,
            moment(artifact.create_time),
        )
        for artifact in artifacts
    )
    session.out.table(("NAME", "KIND", "FILES", "SIZE", "PATH", "CREATED"), rows, artifacts)


@command(app, "download")
def download(
    session: Session,
    job: JobArgument,
    name: NameArgument,
    to: Annotated[Path, typer.Option("--to", help="Directory; <job>/<name> when left out.")] = Path(),
) -> None:
    """Downloads an artifact, verified by SHA-256; an interrupted download goes on where it stopped."""
    directory = to if to != Path() else Path(job) / name
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=session.out.remarks, disable=not session.out.remarks.is_terminal) as bars:

        def show(progress: TransferProgress) -> None:
            if progress.path not in tasks:
                tasks[progress.path] = bars.add_task(progress.path, total=progress.total_bytes)
            bars.update(tasks[progress.path], completed=progress.done_bytes)

        paths = session.client.artifacts.download(job, name, directory, progress=show)
    if session.out.is_json:
        session.out.json([str(path) for path in paths])
    else:
        for path in paths:
            session.out.line(str(path))


@command(app, "export")
def export(
    session: Session,
    job: Annotated[str, typer.Option("--job", help="Id of the finished job.")],
    format: Annotated[str, typer.Option("--format", help="merged: base and adapter as one 16-bit model.")] = "merged",
    max_logit_difference: Annotated[
        float | None, typer.Option("--max-logit-difference", min=0, help="Refuse an export that differs by more.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Watch it until it is over.")] = False,
) -> None:
    """Queues a job that writes what a finished job trained in another form."""
    queued = session.client.artifacts.export(job, format, max_logit_difference=max_logit_difference)
    show_started(session, queued, follow=wait)


@command(app, "delete")
def delete(session: Session, job: JobArgument, name: NameArgument) -> None:
    """Deletes an artifact; the disk is freed."""
    session.client.artifacts.delete(job, name)
    session.out.remark(f"deleted {name} of job {job}")
