"""What a checkpoint's manifest says before anything is planned on it. Verifies nothing: who goes on from it does."""

from __future__ import annotations

import json
from pathlib import Path

from gpu_service.domain.trainer import REFERENCE
from gpu_service.engine import durable

TRAINER = "trainer"


def read_trainer(directory: Path) -> str:
    """What trained the steps of a checkpoint: `fast` or `reference`.

    One that does not say is of a version that had transformers and PEFT alone. Empty where the manifest cannot be read,
    which its verification will tell.
    """
    try:
        manifest = json.loads((directory / durable.MANIFEST_FILE).read_text(encoding="utf-8"))
        return str(manifest.get(TRAINER) or REFERENCE)
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""
