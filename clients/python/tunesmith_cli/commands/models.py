"""`tunesmith models`: base models of the nodes, and importing one into a models directory of this machine."""

import typer

from tunesmith_cli.chores import IMPORTING_MODULE, run_module
from tunesmith_cli.session import Session, command
from tunesmith_cli.text import byte_count

# Where `tunesmith up` looks for them.
DEFAULT_MODELS_DIRECTORY = "data/models"

app = typer.Typer(help="Base models.", no_args_is_help=True)


@command(app, "list")
def list_models(session: Session) -> None:
    """Lists the base models of all reachable nodes."""
    models = list(session.client.models.list())
    rows = (
        (
            model.name,
            model.config_type,
            f"{model.num_parameters / 1e6:.1f} M",
            byte_count(model.size_bytes),
            "yes" if model.has_chat_template else "no",
            " ".join(model.nodes),
            model.problem,
        )
        for model in models
    )
    session.out.table(("NAME", "TYPE", "PARAMETERS", "SIZE", "CHAT", "NODES", "PROBLEM"), rows, models)


@command(app, "types")
def types(session: Session) -> None:
    """Lists the model families that the nodes can train."""
    families = session.client.models.types()
    rows = (
        (family.model_type, " ".join(family.config_types), " ".join(family.nodes), family.description)
        for family in families
    )
    session.out.table(("MODEL TYPE", "CONFIG TYPES", "NODES", "DESCRIPTION"), rows, families)


@app.command(
    "import",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def import_model(context: typer.Context) -> None:
    """Imports a GGUF, a Hugging Face directory or a hub id into this machine's models directory; see its own --help."""
    arguments = list(context.args)
    if not any(argument.startswith("--models-directory") for argument in arguments):
        arguments += ["--models-directory", DEFAULT_MODELS_DIRECTORY]
    raise typer.Exit(run_module(IMPORTING_MODULE, arguments))
