"""`tunesmith projects`: what people want trained."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from google.protobuf.message import Message

from tunesmith.common.v1 import training_spec_pb2
from tunesmith.control.v1 import project_service_pb2
from tunesmith_cli.lookup import dataset_names, find_dataset, find_project
from tunesmith_cli.project_file import read_project
from tunesmith_cli.session import Session, command
from tunesmith_cli.text import indented_lines, moment

app = typer.Typer(help="What is to be trained.", no_args_is_help=True)

COLUMNS = ("ID", "NAME", "BASE MODEL", "TYPE", "TRAINING", "TRAITS", "UPDATED")
ProjectArgument = Annotated[str, typer.Argument(metavar="PROJECT", help="Name or id.")]


def row(project: project_service_pb2.Project) -> tuple[object, ...]:
    """A project as a row of COLUMNS."""
    return (
        project.project_id,
        project.name,
        project.base_model,
        project.model_type,
        project.training_type,
        " ".join(trait.trait_type for trait in project.traits),
        moment(project.update_time),
    )


@command(app, "create")
def create(
    session: Session,
    file: Annotated[Path, typer.Option("--file", "-f", exists=True, dir_okay=False, help="project.yaml")],
) -> None:
    """Creates a project from a YAML file; datasets in it are names or ids."""
    project = read_project(
        file.read_text(encoding="utf-8"),
        source=str(file),
        dataset_id_of=lambda name: find_dataset(session.client, name).dataset_id,
    )
    created = session.client.projects.create(project)
    session.out.table(COLUMNS, [row(created)], [created])


@command(app, "list")
def list_projects(
    session: Session,
    name_contains: Annotated[str, typer.Option("--name", help="Only names that contain this.")] = "",
) -> None:
    """Lists projects by id."""
    projects = list(session.client.projects.list(name_contains=name_contains))
    session.out.table(COLUMNS, map(row, projects), projects)


@command(app, "show")
def show(session: Session, project: ProjectArgument) -> None:
    """Shows one project."""
    found = find_project(session.client, project)
    session.out.message(
        found,
        [
            ("id", found.project_id),
            ("name", found.name),
            ("base model", found.base_model),
            ("model type", found.model_type),
            ("training type", found.training_type),
            ("output directory", found.output_directory),
            ("created", moment(found.create_time)),
            ("updated", moment(found.update_time)),
            *_settings(found.mix, "mix"),
            *_settings(found.hyperparameters, "hyperparameters"),
        ],
    )
    if not session.out.is_json:
        names = dataset_names(session.client, found)
        rows = [
            (trait.trait_type, f"{trait.weight if trait.HasField('weight') else 1:g}", names[number], percent)
            for trait in found.traits
            for number, percent in _sources(trait)
        ]
        session.out.rows(("TRAIT", "WEIGHT", "DATASET", "PERCENT"), rows)
        for prompt in found.sample_prompts:
            session.out.line(f"sample prompt ({prompt.trait_type}):")
            for line in indented_lines(prompt.prompt, 4):
                session.out.line(line)


def _sources(trait: training_spec_pb2.Trait) -> Iterator[tuple[int, str]]:
    yield from ((source.dataset_id, f"{source.percentage:g}") for source in trait.datasets)
    yield from ((number, "held out") for number in trait.held_out_dataset_ids)


def _settings(message: Message, path: str) -> Iterator[tuple[str, object]]:
    """What is set in a message, by dotted name; what is not set has the documented default."""
    for field, value in message.ListFields():
        name = f"{path}.{field.name}"
        if isinstance(value, Message):
            yield from _settings(value, name)
        else:
            yield name, ", ".join(value) if field.is_repeated else value


@command(app, "delete")
def delete(session: Session, project: ProjectArgument) -> None:
    """Deletes a project that has no live job."""
    found = find_project(session.client, project)
    session.client.projects.delete(found.project_id)
    session.out.remark(f"deleted project {found.project_id} ({found.name})")
