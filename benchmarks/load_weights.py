"""Seconds from weight files to a base on the device: by this engine's reader, and by transformers' `from_pretrained`.

Both load the same random weights of a real shape in 4 bits (double quantized) in one process, in turn, several times;
the model of one is gone before the other's turn. Warm: the files are in the page cache. Cold: they were dropped from
it. `first` (always made once) knows nothing of the files yet and hashes them from front to back; `files` finds them as
they were then; `pieces` verifies every piece of them, as after somebody touched them; `unpinned` asks for no digest;
`copy` reads the node's 4-bit copy. Parity: every quantized byte of the reader's model is the library's.

    python -m benchmarks.load_weights --size 3B --models /tmp/models --out rows.json
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks import random_models
from gpu_service.catalog.weight_files import list_weight_files
from gpu_service.engine.builders.quantization import nf4
from gpu_service.engine.failures import library_versions
from gpu_service.engine.lean import choice
from gpu_service.engine.loading import config as config_stage
from gpu_service.engine.loading import weights as weights_stage
from gpu_service.engine.loading.work import Loaded, LoadRequest
from gpu_service.engine.reading import piece_digests, prequantized, reader
from tunesmith.common.v1 import plan_pb2, training_spec_pb2

ROWS = ("library", "first", "files", "pieces", "unpinned", "copy", "library-16bit", "files-16bit")
_DTYPE = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all rows share."""

    directory: Path
    cache: Path
    digest: str
    device: torch.device


def request_for(setting: Setting, *, quantized: bool, pinned: bool) -> LoadRequest:
    """What a run of the fast path asks of loading."""
    quantization = training_spec_pb2.Quantization(
        method="nf4" if quantized else "none", double_quantization=quantized, compute_dtype="bfloat16"
    )
    plan = plan_pb2.Plan(resolved=training_spec_pb2.Hyperparameters(quantization=quantization))
    made_with = choice.builders(plan)
    return LoadRequest(
        model_directory=setting.directory,
        base_model="random",
        weights_digest=setting.digest if pinned else "",
        plan=plan,
        family=made_with.family,
        quantization=made_with.quantization,
        method=made_with.method,
        is_lean=True,
        compute_dtype=_DTYPE,
        device=setting.device,
        cache_directory=setting.cache,
        quantizer="own" if quantized else "",
    )


def by_reader(setting: Setting, *, quantized: bool = True, pinned: bool = True) -> tuple[Any, dict[str, Any]]:
    """The base as stages CONFIG and WEIGHTS make it, and what went into its seconds."""
    loaded = Loaded()
    request = request_for(setting, quantized=quantized, pinned=pinned)
    details: dict[str, str] = {}
    for stage in (config_stage, weights_stage):
        details |= stage.run(request, loaded, lambda done, total, unit: None)
    _synchronize(setting.device)
    if "reader_threads" not in details:
        raise SystemExit("the reader left this model to the library")
    return loaded, {**{name: round(value, 3) for name, value in loaded.timings.items()}, **details}


def by_library(setting: Setting, *, quantized: bool = True) -> tuple[Any, dict[str, Any]]:
    """As its documentation says."""
    config = nf4.build_config(double_quantization=True, compute_dtype=_DTYPE) if quantized else None
    model = LlamaForCausalLM.from_pretrained(
        setting.directory, quantization_config=config, dtype=_DTYPE, device_map={"": str(setting.device)}
    )
    _synchronize(setting.device)
    return model, {}


@contextmanager
def _kept(setting: Setting, row: str) -> Iterator[None]:
    """What the node has kept decides which way the reader takes: nothing, or no copy, or both."""
    if row == "first":
        shutil.rmtree(setting.cache, ignore_errors=True)
    if row not in ("files", "pieces"):
        yield
        return
    if row == "pieces":
        files = list_weight_files(setting.directory)
        record = piece_digests.find(setting.cache, setting.digest, files)
        if record is None:
            raise SystemExit("there are no digests of pieces to compare")
        piece_digests.keep(setting.cache, setting.digest, record.digests, {})
    copies, aside = setting.cache / prequantized.DIRECTORY, setting.cache / "aside"
    smallest, prequantized.SMALLEST_BYTES = prequantized.SMALLEST_BYTES, sys.maxsize
    if copies.is_dir():
        copies.rename(aside)
    try:
        yield
    finally:
        if aside.is_dir():
            aside.rename(copies)
        prequantized.SMALLEST_BYTES = smallest


_LOADERS: dict[str, Callable[[Setting], tuple[Any, dict[str, Any]]]] = {
    "library": by_library,
    "first": by_reader,
    "files": by_reader,
    "pieces": by_reader,
    "unpinned": lambda setting: by_reader(setting, pinned=False),
    "copy": by_reader,
    "library-16bit": lambda setting: by_library(setting, quantized=False),
    "files-16bit": lambda setting: by_reader(setting, quantized=False),
}


def measure(setting: Setting, row: str, *, cold: bool) -> dict[str, Any]:
    """One load. `peak_bytes` is torch's, on CUDA."""
    with _kept(setting, row):
        if cold:
            drop_from_page_cache(setting.directory)
            drop_from_page_cache(setting.cache)
        if setting.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        made, parts = _LOADERS[row](setting)
        seconds = time.perf_counter() - began
    if row == "copy" and parts["read_from"] == "files":
        raise SystemExit("there is no 4-bit copy to read")
    peak_bytes = torch.cuda.max_memory_allocated() if setting.device.type == "cuda" else 0
    if isinstance(made, Loaded) and made.copying is not None:
        made.copying.join()
    del made
    _forget(setting.device)
    size = setting.directory.name
    return {"size": size, "row": row, "cold": cold, "seconds": round(seconds, 3), "peak_bytes": peak_bytes, **parts}


def check_parity(setting: Setting) -> int:
    """Quantized bytes that are equal, all of them. Raises SystemExit for one that is not."""
    library, _ = by_library(setting)
    expected = {name: value.cpu() for name, value in _quantized_parts(library)}
    del library
    _forget(setting.device)
    loaded, _ = by_reader(setting)
    num_bytes = 0
    for name, value in _quantized_parts(loaded.base):
        if not torch.equal(value.cpu(), expected.pop(name)):
            raise SystemExit(f"{name} is not the library's")
        num_bytes += value.nbytes
    if expected:
        raise SystemExit(f"the reader quantized nothing of {', '.join(expected)}")
    if loaded.copying is not None:
        loaded.copying.join()
    del loaded
    _forget(setting.device)
    return num_bytes


def _quantized_parts(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield f"{name} packed", parameter.data
            yield f"{name} scales", state.absmax
            yield f"{name} nested", state.state2.absmax
            yield f"{name} offset", state.offset


def drop_from_page_cache(directory: Path) -> None:
    """Every file below `directory`; what was written lately is on the disk first."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def sweep(setting: Setting) -> list[dict[str, Any]]:
    """Gigabytes a second of reading alone, with hashing, and onto the device, by threads and bytes of a piece."""
    rows = []
    files = sorted(setting.directory.glob("*.safetensors"))
    for piece_mib in (4, 8, 16):
        for threads in (8, 16):
            row: dict[str, Any] = {"piece_mib": piece_mib, "threads": threads}
            for what in ("read", "hash", "copy"):
                row[what] = round(_rate(files, setting.device, what, piece_mib * 1024**2, threads), 1)
            print(" ".join(f"{name}={value}" for name, value in row.items()), flush=True)
            rows.append(row)
    return rows


def _rate(files: list[Path], device: torch.device, what: str, piece_bytes: int, threads: int) -> float:
    place = torch.empty(piece_bytes, dtype=torch.uint8, device=device)
    kept, reader.PIECE_BYTES = reader.PIECE_BYTES, piece_bytes
    try:
        tasks: list[Any] = []
        for file in files:
            for piece in reader.cut(file, 0, file.stat().st_size, {}):
                if what == "copy":
                    destination = place[: piece.num_bytes]
                    tasks.append(reader.PlainTask(pieces=[piece], dtype=torch.uint8, destination=destination))
                else:
                    tasks.append(reader.HashTask(pieces=[piece]))
        began = time.perf_counter()
        reading = reader.Reading(tasks, device, hashes=what == "hash", num_threads=threads)
        reading.start()
        try:
            reading.wait(lambda done: None)
        finally:
            reading.close()
        return reading.total_bytes / (time.perf_counter() - began) / 1e9
    finally:
        reader.PIECE_BYTES = kept


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _digest(directory: Path) -> str:
    """As the catalog makes it, with the files hashed at the same time."""
    files = list_weight_files(directory)
    whole = hashlib.sha256()
    with ThreadPoolExecutor(len(files)) as executor:
        for file, digest in zip(files, executor.map(_hash, files), strict=True):
            whole.update(f"{file.name}\0{digest}\n".encode())
    return whole.hexdigest()


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def measure_size(arguments: argparse.Namespace, size: str, device: torch.device) -> dict[str, Any]:
    """All rows of one shape."""
    directory = arguments.models / "random" / size
    if not directory.is_dir():
        began = time.perf_counter()
        random_models.place(arguments.models, size)
        print(f"wrote {directory} in {time.perf_counter() - began:.1f} s", flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.models) as cache:
        setting = Setting(directory=directory, cache=Path(cache) / "cache", digest=_digest(directory), device=device)
        report: dict[str, Any] = {}
        # Kernels are compiled and libraries imported, and digests and copy made, before anything counts.
        report["rows"] = [_print(measure(setting, "first", cold=False))]
        report["rows"] += [
            _print(measure(setting, row, cold=cold))
            for cold in ((False, True) if arguments.cold else (False,))
            for _ in range(1 if cold else arguments.repeats)
            for row in arguments.rows
        ]
        if arguments.parity:
            report["parity_bytes"] = check_parity(setting)
            print(f"parity: {report['parity_bytes']:,} quantized bytes are the library's", flush=True)
        if arguments.sweep:
            report["sweep"] = sweep(setting)
    for row in arguments.rows:
        seconds = [one["seconds"] for one in report["rows"] if one["row"] == row and not one["cold"]]
        print(f"{size} {row:14} warm median {statistics.median(seconds):.3f} s  ({min(seconds)} to {max(seconds)})")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", nargs="+", choices=sorted(random_models.SHAPES), default=["3B"])
    parser.add_argument("--models", type=Path, required=True, help="where random models are, or are written to")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["files", "copy", "library"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="each row once more with the files dropped from the cache")
    parser.add_argument("--threads", type=int, default=0, help="reading threads; 0: as the engine decides")
    parser.add_argument("--parity", action="store_true", help="compare every quantized byte with the library's")
    parser.add_argument("--sweep", action="store_true", help="rates by threads and bytes of a piece")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.threads:
        reader.MAX_THREADS = arguments.threads
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    _synchronize(device)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "cpus": os.cpu_count(),
        "versions": library_versions(),
        "size": " ".join(arguments.size),
        "rows": [],
    }
    print(f"{report['device']}, {report['cpus']} CPUs, {reader.MAX_THREADS} threads at most", flush=True)
    for size in arguments.size:
        measured = measure_size(arguments, size, device)
        report["rows"] += measured.pop("rows")
        report |= {f"{name}_{size}": value for name, value in measured.items()}
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(report, indent=1), encoding="utf-8")


def _print(row: dict[str, Any]) -> dict[str, Any]:
    parts = " ".join(f"{name}={value}" for name, value in row.items() if name not in ("size", "row", "cold"))
    print(f"{row['size']} {row['row']:14} {'cold' if row['cold'] else 'warm'} {parts}", flush=True)
    return row


if __name__ == "__main__":
    main()
