"""What a checkpoint's manifest says before anything is planned on it. Verifies nothing: who goes on from it does."""

from __future__ import annotations

import json
from pathlib import Path

from gpu_service.domain.trainer import trainer_of
from gpu_service.engine import durable


def read_trainer(directory: Path) -> str:
    """What trained the steps of a checkpoint: `fast` or `reference`; empty where the manifest cannot be read, which its
    verification will tell.
    """
    try:
        return trainer_of(json.loads((directory / durable.MANIFEST_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
