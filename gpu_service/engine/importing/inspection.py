"""Reads what a model directory says about itself, without loading it: every import passes through here before it lands.

It refuses what would run code (`auto_map`), weights that are not safetensors, weights that are cut short, and a
directory without config or tokenizer. It imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_service.engine.importing.errors import ImportRefused, Reason

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# Files that name Python code to run when `auto_map` is in them; all are checked, wanted or not.
CONFIG_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "image_processor_config.json",
    "feature_extractor_config.json",
    "video_preprocessor_config.json",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, kw_only=True)
class ModelSummary:
    """What one line about an imported model says."""

    model_type: str
    num_parameters: int
    dtypes: tuple[str, ...]
    weights_bytes: int
    weights_digest: str
    has_chat_template: bool


def inspect_model(directory: Path) -> ModelSummary:
    """Check the directory and sum it up; the first fault is raised with the file's name."""
    refuse_remote_code(directory)
    model_type = read_json_object(directory / "config.json").get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ImportRefused(Reason.INVALID_MODEL, "config.json does not name a model_type")
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise ImportRefused(Reason.INVALID_MODEL, f"there is no tokenizer: none of {', '.join(TOKENIZER_FILES)}")
    files = weight_files(directory)
    num_parameters, dtypes = 0, set()
    for file in files:
        for entry in _tensor_entries(file):
            num_parameters += math.prod(entry["shape"])
            dtypes.add(str(entry["dtype"]))
    return ModelSummary(
        model_type=model_type,
        num_parameters=num_parameters,
        dtypes=tuple(sorted(dtypes)),
        weights_bytes=sum(file.stat().st_size for file in files),
        weights_digest=weights_digest(files),
        has_chat_template=_has_chat_template(directory),
    )


def refuse_remote_code(directory: Path) -> None:
    for name in CONFIG_FILES:
        path = directory / name
        if path.is_file() and "auto_map" in read_json_object(path):
            raise ImportRefused(
                Reason.REMOTE_CODE, f"{name} has auto_map, which asks to run the model's own code; that is never done"
            )


def read_json_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ImportRefused(Reason.INVALID_MODEL, f"there is no {path.name}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ImportRefused(Reason.INVALID_MODEL, f"{path.name} could not be read: {error}") from error
    if not isinstance(values, dict):
        raise ImportRefused(Reason.INVALID_MODEL, f"{path.name} does not hold a JSON object")
    return values


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that belong to the model, by name; the index decides where there is one."""
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    if (directory / INDEX_FILE).is_file():
        return _indexed_files(directory)
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise ImportRefused(
            Reason.PICKLE_WEIGHTS,
            f"the weights are pickle files ({pickles[0]}), which can run code when read and are never loaded; "
            "only safetensors are accepted",
        )
    raise ImportRefused(
        Reason.INVALID_MODEL, f"there are no safetensors weights: neither {SINGLE_FILE} nor {INDEX_FILE}"
    )


def _indexed_files(directory: Path) -> list[Path]:
    weight_map = read_json_object(directory / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ImportRefused(Reason.INVALID_MODEL, f"{INDEX_FILE} has no weight_map")
    names = {name for name in weight_map.values() if isinstance(name, str)}
    if len(names) == 0 or len(names) < len(set(map(str, weight_map.values()))):
        raise ImportRefused(Reason.INVALID_MODEL, f"{INDEX_FILE} has a weight_map that does not name files")
    for name in sorted(names):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ImportRefused(Reason.INVALID_MODEL, f"{INDEX_FILE} names {name!r}, which is not a safetensors file")
        if not (directory / name).is_file():
            raise ImportRefused(Reason.INVALID_MODEL, f"{INDEX_FILE} names {name}, which is not there")
    return [directory / name for name in sorted(names)]


def _tensor_entries(file: Path) -> list[dict[str, Any]]:
    """The header's entries, after checking that the file is as long as they say."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER_BYTES + 1
        if header_bytes > min(_MAX_HEADER_BYTES, size):
            raise ImportRefused(Reason.INVALID_MODEL, f"{file.name} is not a safetensors file")
        raw = stream.read(header_bytes)
    try:
        header = json.loads(raw)
        entries = [entry for key, entry in header.items() if key != "__metadata__"]
        end = max((int(entry["data_offsets"][1]) for entry in entries), default=0)
        for entry in entries:
            math.prod(entry["shape"])
    except (ValueError, AttributeError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise ImportRefused(Reason.INVALID_MODEL, f"{file.name} has a broken header: {error}") from error
    if 8 + header_bytes + end != size:
        raise ImportRefused(
            Reason.INVALID_MODEL,
            f"{file.name} is {size} bytes long, its header says {8 + header_bytes + end}: it was cut short or changed",
        )
    return entries


def weights_digest(files: list[Path]) -> str:
    """The same as `sha256sum *.safetensors | sha256sum`: the digest of the files' digests and names, in name order."""
    lines = []
    for file in sorted(files, key=lambda path: path.name):
        with file.open("rb") as stream:
            lines.append(f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {file.name}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _has_chat_template(directory: Path) -> bool:
    if (directory / "chat_template.jinja").is_file():
        return True
    path = directory / "tokenizer_config.json"
    return path.is_file() and bool(read_json_object(path).get("chat_template"))
