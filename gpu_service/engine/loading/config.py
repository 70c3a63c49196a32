"""Stage CONFIG: config.json becomes a config object.

A config.json without `model_type` is read by the family's own class. The file is never edited, and no remote code runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gpu_service.engine.lean.config import LeanConfig
from gpu_service.engine.loading.work import Loaded, LoadRequest, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# AutoConfig raises OSError for a file that is missing or no JSON, ValueError for a type it does not know, and KeyError
# or TypeError for values that a config class cannot take.
RAISES: tuple[type[Exception], ...] = (OSError, ValueError, KeyError, TypeError)


class ConfigOfAnotherFamily(ValueError):
    """The model's config is not of the family that was planned."""


def run(request: LoadRequest, loaded: Loaded, progress: Progress) -> dict[str, str]:
    """Make `loaded.config`."""
    loaded.file = "config.json"
    progress(0, 1, "files")
    config: Any
    if request.is_lean:
        config = LeanConfig.read(request.model_directory)
    else:
        config = read_config(request.model_directory, request.family)
    loaded.config = config
    progress(1, 1, "files")
    return {"config_class": type(config).__name__, "model_type": config.model_type}


def read_config(directory: Path, family: ModuleType) -> PreTrainedConfig:
    """The config object of a model directory, of the family's class. Raises ConfigOfAnotherFamily and RAISES."""
    # Not imported where the fast path makes the model: it takes seconds.
    from transformers import AutoConfig, PreTrainedConfig

    path = directory / "config.json"
    if _names_a_type(path.read_text(encoding="utf-8")):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    else:
        config = family.CONFIG_CLASS.from_json_file(path)
    if not isinstance(config, family.CONFIG_CLASS):
        raise ConfigOfAnotherFamily(
            f"config.json makes a {type(config).__name__}; the plan is for {family.CONFIG_CLASS.__name__}"
        )
    assert isinstance(config, PreTrainedConfig)
    return config


def _names_a_type(text: str) -> bool:
    # What is no JSON object is left to transformers, whose message the failure then carries.
    try:
        document = json.loads(text)
    except ValueError:
        return True
    return not isinstance(document, dict) or "model_type" in document
