"""What the demo trains: a project file and the dataset files that it names. Reads files; talks to nobody."""

from dataclasses import dataclass
from pathlib import Path

import typer

from tunesmith_cli.project_file import read_project

# From a clone: clients/python/tunesmith_cli/demo/examples.py -> examples/.
DEFAULT_EXAMPLES = Path(__file__).resolve().parents[4] / "examples"
PROJECT_FILE = "demo_project.yaml"


@dataclass(frozen=True, kw_only=True)
class Example:
    """A project's text, its base model, and its dataset files by the dataset's name."""

    project_text: str
    source: str
    base_model: str
    files: dict[str, Path]


def read_example(directory: Path) -> Example:
    """Reads the project file and finds `data/<name>.jsonl` for every dataset in it. Wrong usage when one is missing."""
    project_file = directory / PROJECT_FILE
    if not project_file.is_file():
        raise typer.BadParameter(f"{project_file} is not there; give the examples of a clone", param_hint="--examples")
    text = project_file.read_text(encoding="utf-8")
    files: dict[str, Path] = {}

    def note(name: str) -> int:
        files[name] = directory / "data" / f"{name}.jsonl"
        # Any id will do: this pass only collects names.
        return 1

    project = read_project(text, source=str(project_file), dataset_id_of=note)
    for name, path in files.items():
        if not path.is_file():
            raise typer.BadParameter(f"{path} (dataset {name}) is not there", param_hint="--examples")
    return Example(project_text=text, source=str(project_file), base_model=project.base_model, files=files)
