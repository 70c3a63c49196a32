"""Stage WEIGHTS: the weight files are read, and their tensors mapped; without quantization they become the model here.

Every shard is read from front to back once and hashed, so that progress in bytes is real and a damaged disk shows here,
with the file's name, unless it is what it was when the node hashed it (`reading.verification`); safetensors checks the
header and maps the tensors, which cost no memory of their own. A job that starts from a whole model of an earlier one
reads that model's files in place of the base's. Refuses everything but safetensors, and a base of another digest than
the job was pinned to.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gpu_service.engine.lean.model import LeanCausal
from gpu_service.engine.loading import direct
from gpu_service.engine.loading.building import build_base
from gpu_service.engine.loading.places import NotTensorForTensor
from gpu_service.engine.loading.work import HeldBase, Loaded, LoadRequest, Progress
from gpu_service.engine.reading.verification import IDENTITY, NOTHING, WHOLE, Verification

# safetensors raises its own error for a file that is not whole, OSError when it cannot be read; from_pretrained raises
# RuntimeError for tensors of other shapes than the config says, ValueError for missing ones (ours) and bad options.
RAISES: tuple[type[Exception], ...] = (SafetensorError, OSError, RuntimeError, ValueError, KeyError)

_LOG = logging.getLogger(__name__)
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Name of the artifact that `full` leaves.
MODEL_ARTIFACT = "model"
_CHUNK_BYTES = 8 * 1024 * 1024


class WeightsChanged(ValueError):
    """The files are not those that the job was pinned to."""


class TensorNotInShard(KeyError):
    """The index names a shard for a tensor that the shard does not hold."""


def run(request: LoadRequest, loaded: Loaded, progress: Progress) -> dict[str, str]:
    """Make `loaded.tensors`, or `loaded.base` when the base is not quantized."""
    if request.resident is not None:
        _take(request, loaded, request.resident)
        if request.has_resident:
            loaded.base = request.resident.model
            return {"resident": "true"}
        # Before the files' tensors need its room.
        gc.collect()
    starts_from_model = request.start is not None and request.start.name == MODEL_ARTIFACT
    directory = request.start.directory if request.start is not None and starts_from_model else request.model_directory
    shards = list_shards(directory, loaded)
    total = 0
    for shard in shards:
        loaded.file = shard
        total += (directory / shard).stat().st_size
    _check_shards(directory, shards, loaded)
    # The files of an earlier job were verified one by one when they came.
    pinned = "" if starts_from_model else request.weights_digest
    details = {"shards": str(len(shards))}
    if starts_from_model:
        details["start_from"] = MODEL_ARTIFACT
    if direct.is_wanted(request):
        source = direct.Source(files=[directory / shard for shard in shards], digest=pinned)
        try:
            found = direct.load(request, loaded, source, progress)
        except direct.DigestDiffers as error:
            raise WeightsChanged(f"the weights' digest is {error}; the job is for {pinned}") from error
        if found is not None:
            loaded.file = ""
            return details | found | {"model_class": type(loaded.base).__name__}
        if request.is_lean:
            raise WeightsChanged("the weight files changed while they were read")
    return details | _load_by_library(request, loaded, directory, shards, pinned, total, progress)


def _load_by_library(
    request: LoadRequest,
    loaded: Loaded,
    directory: Path,
    shards: Mapping[str, list[str]],
    pinned: str,
    total: int,
    progress: Progress,
) -> dict[str, str]:
    verification = Verification(request.cache_directory, [directory / shard for shard in shards], pinned)
    is_known = verification.by == IDENTITY
    tensors: dict[str, torch.Tensor] = {}
    done = 0
    digest = hashlib.sha256()
    for shard in shards:
        loaded.file = shard
        if is_known:
            done += _read_ahead(directory / shard)
            progress(done, total, "bytes")
        else:
            contents = hashlib.sha256()
            done = _read(directory / shard, contents, done, total, progress)
            digest.update(f"{shard}\0{contents.hexdigest()}\n".encode())
        with safe_open(directory / shard, framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                tensors[name] = opened.get_tensor(name)
    if (changed := verification.find_changed()) is not None:
        loaded.file = changed.name
        raise WeightsChanged(f"{changed.name} was changed while it was read")
    loaded.file = ""
    if pinned and not is_known and digest.hexdigest() != pinned:
        raise WeightsChanged(f"the weights' digest is {digest.hexdigest()}; the job is for {pinned}")
    loaded.tensors = tensors
    loaded.stored_dtype = _most_common_dtype(tensors)
    details = {
        "tensors": str(len(tensors)),
        "stored_dtype": str(loaded.stored_dtype),
        "verified_by": IDENTITY if is_known else WHOLE if pinned else NOTHING,
    }
    if request.quantization.IS_QUANTIZED:
        return details
    loaded.base = build_base(request, loaded, None, progress)
    return details | {"model_class": type(loaded.base).__name__}


def _check_shards(directory: Path, shards: Mapping[str, list[str]], loaded: Loaded) -> None:
    """safetensors' own verdict on each file, and that it holds what the index says. Reads headers only."""
    for shard, names in shards.items():
        loaded.file = shard
        with safe_open(directory / shard, framework="pt", device="cpu") as opened:
            held = set(opened.keys())
        missing = [name for name in names if name not in held]
        if missing:
            raise TensorNotInShard(f"{shard} does not hold {', '.join(sorted(missing)[:5])}")
    loaded.file = ""


def _take(request: LoadRequest, loaded: Loaded, held: HeldBase) -> None:
    """Have `held` be the base as who asks can use it; None where only the files make such a one."""
    if request.is_lean or not isinstance(held.model, LeanCausal):
        return
    # Not imported where the fast path makes the model: it takes seconds.
    from gpu_service.engine.lean.promotion import promote

    try:
        held.model = promote(request, loaded, held.model)
    except NotTensorForTensor as error:
        # As where the library has to load what this engine's reader cannot place.
        _LOG.info("the base on the device is read anew: %s", error)
        held.model = None


def list_shards(directory: Path, loaded: Loaded | None = None) -> dict[str, list[str]]:
    """Each shard's file name with the tensors that the index says it holds (none said for a single file).

    `loaded` hears which file is in hand. Raises OSError, ValueError, KeyError.
    """
    loaded = loaded or Loaded()
    if not (directory / INDEX_FILE).is_file():
        loaded.file = SINGLE_FILE
        return {SINGLE_FILE: []}
    loaded.file = INDEX_FILE
    weight_map: dict[str, str] = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
    shards: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        if Path(shard).name != shard:
            raise ValueError(f"the index names a shard outside the model's directory: {shard!r}")
        shards.setdefault(shard, []).append(tensor)
    return dict(sorted(shards.items()))


def _read(path: Path, contents: Any, done: int, total: int, progress: Progress) -> int:
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            contents.update(buffer[:count])
            done += count
            progress(done, total, "bytes")
    return done


def _read_ahead(path: Path) -> int:
    """Have the kernel begin to read what will be mapped, faster than page by page; the file's bytes."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        return os.fstat(file.fileno()).st_size


def _most_common_dtype(tensors: dict[str, torch.Tensor]) -> torch.dtype:
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32
