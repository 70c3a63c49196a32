"""`tunesmith datasets`: immutable sets of examples."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from tunesmith.control.v1 import dataset_service_pb2
from tunesmith_cli.lookup import find_dataset
from tunesmith_cli.session import Session, command
from tunesmith_cli.text import byte_count, moment
from tunesmith_client import TransferProgress

app = typer.Typer(help="Sets of examples.", no_args_is_help=True)

COLUMNS = ("ID", "NAME", "FORMAT", "EXAMPLES", "SIZE", "CREATED")
DatasetArgument = Annotated[str, typer.Argument(metavar="DATASET", help="Name or id.")]
FormatOption = Annotated[str, typer.Option("--format", help="Catalog id of the format; detected when left out.")]


def row(dataset: dataset_service_pb2.Dataset) -> tuple[object, ...]:
    """A dataset as a row of COLUMNS."""
    return (
        dataset.dataset_id,
        dataset.name,
        dataset.format,
        dataset.num_examples,
        byte_count(dataset.size_bytes),
        moment(dataset.create_time),
    )


@command(app, "list")
def list_datasets(
    session: Session,
    name_contains: Annotated[str, typer.Option("--name", help="Only names that contain this.")] = "",
) -> None:
    """Lists datasets by id."""
    datasets = list(session.client.datasets.list(name_contains=name_contains))
    session.out.table(COLUMNS, map(row, datasets), datasets)


@command(app, "upload")
def upload(
    session: Session,
    file: Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="JSON lines.")],
    name: Annotated[str, typer.Option("--name", help="Unique name; the file's own when left out.")] = "",
    format: FormatOption = "",
) -> None:
    """Uploads a file and registers it; every row is read before the answer."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=session.out.remarks, disable=not session.out.remarks.is_terminal) as bars:
        task = bars.add_task(file.name, total=file.stat().st_size)

        def show(progress: TransferProgress) -> None:
            bars.update(task, completed=progress.done_bytes)

        dataset = session.client.datasets.upload(file, name=name or file.stem, format=format, progress=show)
    session.out.table(COLUMNS, [row(dataset)], [dataset])


@command(app, "register")
def register(
    session: Session,
    path: Annotated[str, typer.Argument(metavar="PATH", help="Relative path below the service's import root.")],
    name: Annotated[str, typer.Option("--name", help="Unique name.")],
    format: FormatOption = "",
) -> None:
    """Registers a file that the control service can read itself."""
    dataset = session.client.datasets.register(name, path, format=format)
    session.out.table(COLUMNS, [row(dataset)], [dataset])


@command(app, "preview")
def preview(
    session: Session,
    dataset: DatasetArgument,
    num_rows: Annotated[int, typer.Option("--rows", "-n", min=1, max=100, help="How many rows.")] = 5,
) -> None:
    """Prints the first rows as they are in the file."""
    found = find_dataset(session.client, dataset)
    rows = session.client.datasets.preview(found.dataset_id, num_rows=num_rows)
    session.out.table(("LINE", "JSON"), ((row.line, row.json) for row in rows), rows)


@command(app, "delete")
def delete(session: Session, dataset: DatasetArgument) -> None:
    """Deletes a dataset that nothing uses."""
    found = find_dataset(session.client, dataset)
    session.client.datasets.delete(found.dataset_id)
    session.out.remark(f"deleted dataset {found.dataset_id} ({found.name})")
