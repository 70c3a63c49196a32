"""`tunesmith datasets`: immutable sets of examples."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from tunesmith_cli.dataset_view import COLUMNS, row, show_dataset, show_rows
from tunesmith_cli.lookup import find_dataset
from tunesmith_cli.session import Session, command
from tunesmith_client import TransferProgress

app = typer.Typer(help="Sets of examples.", no_args_is_help=True)

DatasetArgument = Annotated[str, typer.Argument(metavar="DATASET", help="Name or id.")]
FormatOption = Annotated[str, typer.Option("--format", help="Catalog id of the rows' format; found when left out.")]
_FILE_HELP = "JSON lines, JSON, CSV or Parquet; plain, gzip, bzip2, xz or zstd."
ModelOption = Annotated[str, typer.Option("--base-model", help="Base model whose tokenizer to use, as `org/name`.")]


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
    file: Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help=_FILE_HELP)],
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


@command(app, "show")
def show(session: Session, dataset: DatasetArgument, base_model: ModelOption = "") -> None:
    """Shows a dataset and what was counted of it; with a base model also its tokens."""
    found = find_dataset(session.client, dataset)
    if base_model:
        found = session.client.datasets.get(found.dataset_id, base_model=base_model)
    show_dataset(session.out, found)


@command(app, "preview")
def preview(
    session: Session,
    dataset: DatasetArgument,
    num_rows: Annotated[int, typer.Option("--rows", "-n", min=1, max=100, help="How many rows.")] = 5,
    base_model: ModelOption = "",
    chat_template: Annotated[str, typer.Option("--chat-template", help="Catalog id, for a base without one.")] = "",
    loss_on: Annotated[str, typer.Option("--loss-on", help="`targets` or `all`.")] = "",
    max_length: Annotated[int, typer.Option("--max-length", min=0, help="Tokens at which a row is cut.")] = 0,
) -> None:
    """Prints the first rows as they are stored; with a base model as it will see them, what carries loss marked."""
    found = find_dataset(session.client, dataset)
    rows = session.client.datasets.preview(
        found.dataset_id,
        num_rows=num_rows,
        base_model=base_model,
        chat_template=chat_template,
        loss_on=loss_on,
        max_length=max_length,
    )
    show_rows(session.out, rows)


@command(app, "delete")
def delete(session: Session, dataset: DatasetArgument) -> None:
    """Deletes a dataset that nothing uses."""
    found = find_dataset(session.client, dataset)
    session.client.datasets.delete(found.dataset_id)
    session.out.remark(f"deleted dataset {found.dataset_id} ({found.name})")
