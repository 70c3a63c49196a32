"""The base by this engine's own reader: many threads bring tensors to their places while transformers makes the model.

The places are made first, empty; the model class' own `from_pretrained` takes them for the tensors of a state dict (of
one that is quantized already, where layers are), so that names, tying, types and modules stay its work, and nothing is
made twice. Meanwhile the threads fill them. Layers are bitsandbytes' own, with its own weights and states; only what
quantizes them is ours. A model that is not tensor for tensor what the files hold is not for this module: it says so
before anything is read, and the library loads it, or fails, as it always does.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from gpu_service.engine.fast_path.nf4 import BLOCK_WEIGHTS, NESTED_BLOCK, OWN
from gpu_service.engine.fast_path.quantizing import Tables
from gpu_service.engine.loading.building import from_tensors
from gpu_service.engine.loading.work import Loaded, LoadRequest, Progress
from gpu_service.engine.reading import piece_digests, prequantized
from gpu_service.engine.reading.flat_nf4 import Layout, Parts, QuantizingTask
from gpu_service.engine.reading.reader import HashTask, Piece, PlainTask, Reading, Task, cut
from gpu_service.engine.reading.stored import NoSafetensors, StoredTensor, most_common_dtype, read_header

_LOG = logging.getLogger(__name__)
_HASH_CHUNK_BYTES = 8 * 1024 * 1024
# Threads that have just been read for want the interpreter at once, and transformers' Python gives it up this often.
_SWITCH_SECONDS = 0.0005


class DigestDiffers(ValueError):
    """A piece is not what it was when the whole was verified, or the whole is not what the job is for."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files of a model, in the order that their digest is made in. `digest` empty: not pinned to any."""

    files: Sequence[Path]
    digest: str


@dataclass(frozen=True, kw_only=True)
class _Places:
    """Where tensors go. `layout` and `buffer` hold what is quantized; the rest has tensors of its own by name."""

    stored: Mapping[str, StoredTensor]
    plain: Mapping[str, torch.Tensor]
    layout: Layout
    buffer: torch.Tensor

    def parts(self, name: str) -> Parts:
        return self.layout.parts(name, self.buffer)


def is_wanted(request: LoadRequest) -> bool:
    """Whether the reader may be tried: on CUDA for 16-bit bases, anywhere for those that it quantizes itself."""
    if request.device.type == "cuda" and not torch.cuda.is_available():
        return False
    if request.quantization.IS_QUANTIZED:
        return request.quantizer == OWN
    # On a CPU the library maps plain tensors, and copies none.
    return request.device.type == "cuda"


def load(request: LoadRequest, loaded: Loaded, source: Source, progress: Progress) -> dict[str, str] | None:
    """Make `loaded.base`; None when the library has to, and nothing was read. Raises what reading raises."""
    started = time.perf_counter()
    try:
        headers = {file: read_header(file) for file in source.files}
    except NoSafetensors as error:
        return _leave(str(error))
    stored = {tensor.name: tensor for _, tensors in headers.values() for tensor in tensors}
    quantized, obstacle = _compare(request, loaded, stored)
    if obstacle:
        return _leave(obstacle)
    places = _make_places(request, stored, quantized)
    loaded.timings["places"] = time.perf_counter() - started
    starts = {file: start for file, (start, _) in headers.items()}
    return _fill(request, loaded, source, starts, places, progress)


def _leave(why: str) -> None:
    _LOG.info("the library loads this model: %s", why)


def _compare(
    request: LoadRequest, loaded: Loaded, stored: Mapping[str, StoredTensor]
) -> tuple[dict[str, tuple[int, ...]], str]:
    """Shapes of the matrices that are to be quantized, and why it is the library's work after all, if it is."""
    rounded = request.method.base_dtype(request.compute_dtype)
    if request.quantization.IS_QUANTIZED and request.device.type == "cuda" and rounded is torch.float32:
        return {}, "weights in float32 are quantized by the library alone"
    with torch.device("meta"):
        model = request.family.MODEL_CLASS(copy.deepcopy(loaded.config))
    shapes: dict[str, tuple[int, ...]] = {}
    names_by_tensor: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shapes[name] = tuple(parameter.shape)
        names_by_tensor.setdefault(id(parameter), []).append(name)
    for names in names_by_tensor.values():
        if sum(name in stored for name in names) != 1:
            return {}, f"{names[0]} is not in the files exactly once"
    for name, tensor in stored.items():
        if tensor.shape != shapes.get(name):
            return {}, f"{name} is {tensor.shape} in the files and {shapes.get(name)} in the model"
    if not request.quantization.IS_QUANTIZED:
        return {}, ""
    head = model.get_output_embeddings()
    linears = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and module is not head
    ]
    uneven = next((name for name in linears if shapes[name][1] % BLOCK_WEIGHTS), None)
    if uneven is not None:
        return {}, f"rows of {uneven} are no whole number of blocks"
    return {name: shapes[name] for name in linears}, ""


def _make_places(
    request: LoadRequest, stored: Mapping[str, StoredTensor], quantized: Mapping[str, tuple[int, ...]]
) -> _Places:
    dtype = request.method.base_dtype(request.compute_dtype)
    layout = Layout.of(quantized, double=request.plan.resolved.quantization.double_quantization)
    return _Places(
        stored=stored,
        plain={
            name: torch.empty(tensor.shape, dtype=dtype, device=request.device)
            for name, tensor in stored.items()
            if name not in quantized
        },
        layout=layout,
        buffer=torch.empty(layout.num_bytes, dtype=torch.uint8, device=request.device),
    )


def _fill(
    request: LoadRequest,
    loaded: Loaded,
    source: Source,
    starts: Mapping[Path, int],
    places: _Places,
    progress: Progress,
) -> dict[str, str] | None:
    cache = request.cache_directory if source.digest else None
    known = None if cache is None else piece_digests.find(cache, source.digest, source.files)
    identity, blob = None, None
    if cache is not None and places.layout.shapes and places.layout.num_bytes >= prequantized.SMALLEST_BYTES:
        identity = prequantized.Identity.of(
            source.digest,
            source.files,
            double=places.layout.double,
            rounded=request.method.base_dtype(request.compute_dtype),
            device=request.device,
        )
        # Without digests of the other tensors' pieces all files are read anyway.
        blob = prequantized.find(cache, identity, places.layout.num_bytes) if known else None
    digests = known or {}
    base: Any = None
    while True:
        tasks = _plain_tasks(places, digests)
        if blob is not None:
            tasks += [_blob_task(piece, places) for piece in blob]
        else:
            tasks += _quantizing_tasks(request, places, digests)
            tasks += [HashTask(pieces=cut(file, 0, start, digests.get(file, {}))) for file, start in starts.items()]
        began = time.perf_counter()
        verifies_whole = bool(source.digest) and known is None
        with (
            _running(tasks, request.device, loaded, hashes=verifies_whole) as reading,
            _hashing(source.files if verifies_whole else ()) as hashed,
        ):
            if base is None:
                base = _build(request, loaded, places)
                loaded.timings["model"] = time.perf_counter() - began
                if base is None:
                    return _leave("the library makes another model of the places")
            reading.wait(lambda done: progress(done, reading.total_bytes, "bytes"))
            loaded.timings["reading"] = time.perf_counter() - began
            whole = _join_digests(hashed, progress, reading.total_bytes)
        if reading.differing and blob is not None and reading.differing[0].file == blob[0].file:
            assert identity is not None
            assert cache is not None
            _LOG.warning("the 4-bit copy of weights %s is damaged, and made anew", source.digest)
            prequantized.drop(cache, identity)
            blob = None
            continue
        break
    if reading.differing:
        # Either the files or what was kept of them changed; hashing them whole tells which.
        assert cache is not None
        piece_digests.forget(cache, source.digest)
        return _leave(f"{reading.differing[0].file.name} is not what it was")
    if verifies_whole:
        if whole != source.digest:
            raise DigestDiffers(whole)
        if cache is not None:
            piece_digests.keep(cache, source.digest, reading.digests)
    loaded.timings["verified"] = time.perf_counter() - began
    if cache is not None and identity is not None and blob is None:
        # Of the device's memory, a copy of the writer's own: nothing of a run waits for it, and it for nothing.
        loaded.copying = prequantized.write_behind(cache, identity, places.buffer.cpu())
    loaded.base = base
    loaded.stored_dtype = most_common_dtype(places.stored.values())
    return {
        "tensors": str(len(places.stored)),
        "stored_dtype": str(loaded.stored_dtype),
        "reader_threads": str(reading.num_threads),
        "read_bytes": str(reading.total_bytes),
        "read_from": "files" if blob is None else "the 4-bit copy",
    }


def _plain_tasks(places: _Places, digests: piece_digests.Digests) -> list[Task]:
    """One task a piece: nothing holds the pieces of such a tensor together."""
    tasks: list[Task] = []
    for name, destination in places.plain.items():
        tensor = places.stored[name]
        first = 0
        for piece in _pieces(tensor, digests):
            count = piece.num_bytes // tensor.dtype.itemsize
            flat = destination.view(-1)[first : first + count]
            tasks.append(PlainTask(pieces=[piece], dtype=tensor.dtype, destination=flat))
            first += count
    return tasks


def _quantizing_tasks(request: LoadRequest, places: _Places, digests: piece_digests.Digests) -> list[Task]:
    tables = Tables.on(request.device)
    return [
        QuantizingTask(
            pieces=_pieces(places.stored[name], digests),
            dtype=places.stored[name].dtype,
            rounded=request.method.base_dtype(request.compute_dtype),
            parts=places.parts(name),
            tables=tables,
            num_weights=prod(shape),
        )
        for name, shape in places.layout.shapes.items()
    ]


def _blob_task(piece: Piece, places: _Places) -> Task:
    destination = places.buffer[piece.offset : piece.offset + piece.num_bytes]
    return PlainTask(pieces=[piece], dtype=torch.uint8, destination=destination)


def _pieces(tensor: StoredTensor, digests: piece_digests.Digests) -> list[Piece]:
    return cut(tensor.file, tensor.offset, tensor.num_bytes, digests.get(tensor.file, {}))


@contextmanager
def _running(tasks: Sequence[Task], device: torch.device, loaded: Loaded, *, hashes: bool) -> Iterator[Reading]:
    reading = Reading(tasks, device, hashes=hashes)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        reading.start()
        yield reading
    except OSError:
        if reading.failed_file is not None:
            loaded.file = reading.failed_file.name
        raise
    finally:
        reading.close()
        sys.setswitchinterval(interval)


@contextmanager
def _hashing(files: Sequence[Path]) -> Iterator[list[tuple[Path, Future[str]]]]:
    """Each file hashed from front to back, all at the same time."""
    if not files:
        yield []
        return
    executor = ThreadPoolExecutor(max_workers=len(files), thread_name_prefix="whole-digest")
    try:
        yield [(file, executor.submit(_hash, file)) for file in files]
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_HASH_CHUNK_BYTES))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _join_digests(hashed: Sequence[tuple[Path, Future[str]]], progress: Progress, total: int) -> str:
    whole = hashlib.sha256()
    for file, future in hashed:
        while not future.done():
            progress(total, total, "bytes")
            time.sleep(0.02)
        whole.update(f"{file.name}\0{future.result()}\n".encode())
    return whole.hexdigest()


def _build(request: LoadRequest, loaded: Loaded, places: _Places) -> Any:
    """The model over the places; None when it is not made of just these."""
    config, settings = loaded.config, request.plan.resolved.quantization
    tensors = dict(places.plain)
    if places.layout.shapes:
        config = copy.deepcopy(config)
        config.quantization_config = request.quantization.build_config(
            double_quantization=settings.double_quantization, compute_dtype=request.compute_dtype
        ).to_dict()
        tensors |= {name: places.parts(name).packed for name in places.layout.shapes}
    model, report = from_tensors(request, loaded, config, tensors, None, lambda done, total, unit: None)
    if any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        return None
    if request.quantization.count_quantized(model) != len(places.layout.shapes):
        return None
    if places.layout.shapes and not _attach(model, request, places):
        return None
    held = {name: parameter.data_ptr() for name, parameter in model.named_parameters(remove_duplicate=False)}
    return model if all(held.get(name) == place.data_ptr() for name, place in places.plain.items()) else None


def _attach(model: Any, request: LoadRequest, places: _Places) -> bool:
    """Give each quantized layer its weight, as bitsandbytes has it."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Params4bit

    tables = Tables.on(request.device)
    for name, shape in places.layout.shapes.items():
        layer, parts = model.get_submodule(name.removesuffix(".weight")), places.parts(name)
        if not isinstance(layer, Linear4bit):
            return False
        nested = None
        if parts.nested_scales is not None:
            nested = QuantState(
                absmax=parts.nested_scales, code=tables.nested_codes, blocksize=NESTED_BLOCK, dtype=torch.float32
            )
        state = QuantState(
            absmax=parts.scales,
            shape=torch.Size(shape),
            code=tables.codes,
            blocksize=BLOCK_WEIGHTS,
            quant_type="nf4",
            dtype=request.method.base_dtype(request.compute_dtype),
            offset=parts.offset,
            state2=nested,
        )
        layer.weight = Params4bit(
            parts.packed,
            requires_grad=False,
            quant_state=state,
            blocksize=BLOCK_WEIGHTS,
            compress_statistics=places.layout.double,
            quant_type="nf4",
            quant_storage=torch.uint8,
            module=layer,
            bnb_quantized=True,
        )
        layer.quant_state = state
    return True
