"""Copies what training needs of a Hugging Face directory; leaves pickle files, code and everything else behind."""

from __future__ import annotations

import shutil
from pathlib import Path

from gpu_service.engine.importing.errors import ImportRefused, Reason, storage_errors
from gpu_service.engine.importing.inspection import INDEX_FILE, SINGLE_FILE, refuse_remote_code, weight_files

REQUIRED_FILES = ("config.json",)
OPTIONAL_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    # A model's terms travel with it.
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "NOTICE.txt",
    "USE_POLICY.md",
)


def copy_directory(source: Path, destination: Path, *, move: bool = False) -> None:
    """Fill the existing empty directory `destination`; `source` is only read, unless it is ours to empty (`move`)."""
    if not source.is_dir():
        raise ImportRefused(Reason.SOURCE_NOT_FOUND, f"there is no directory {source}")
    refuse_remote_code(source)
    weights = [file.name for file in weight_files(source)]
    names = [*REQUIRED_FILES, *(name for name in OPTIONAL_FILES if (source / name).is_file()), *weights]
    if weights != [SINGLE_FILE]:
        names.append(INDEX_FILE)
    for name in names:
        if not (source / name).is_file():
            raise ImportRefused(Reason.INVALID_MODEL, f"there is no {name} in {source}")
        with storage_errors():
            if move:
                (source / name).rename(destination / name)
            else:
                # Follows links: a hub cache's snapshot is a directory of links to blobs.
                shutil.copyfile(source / name, destination / name)
