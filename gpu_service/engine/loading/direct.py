"""The base by this engine's own reader: threads bring tensors to their places while transformers makes the model.

What is not tensor for tensor what the model holds is not for this module: it says so before anything is kept, and the
library loads it, or fails, as it always does. What is read is verified: by its bytes, or by being what it was when its
bytes were hashed (`reading.verification`). A copy that is damaged is dropped, and the files are read; a file that
differs leaves the verdict to the whole digest.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch

from gpu_service.domain.quantizer import OWN
from gpu_service.engine.fast_path.quantizing import Tables, make_ready
from gpu_service.engine.loading import places as places_of
from gpu_service.engine.loading import shell
from gpu_service.engine.loading.places import NotTensorForTensor, Places
from gpu_service.engine.loading.work import Loaded, LoadRequest, Progress
from gpu_service.engine.reading import prequantized
from gpu_service.engine.reading.flat_nf4 import QuantizingTask
from gpu_service.engine.reading.reader import HashTask, Piece, PlainTask, Reading, Task, cut
from gpu_service.engine.reading.stored import NoSafetensors, StoredTensor, most_common_dtype, read_header
from gpu_service.engine.reading.verification import PIECES, WHOLE, Verification

_LOG = logging.getLogger(__name__)
_HASH_CHUNK_BYTES = 8 * 1024 * 1024
# Threads that have read a piece want the interpreter at once; while transformers makes the model, it is given up this
# often.
_SWITCH_SECONDS = 0.0005


class DigestDiffers(ValueError):
    """The files, whole, have another digest than they should; the message is theirs."""


class _PiecesDiffer(Exception):
    """Pieces are not what they were when they were verified last."""

    def __init__(self, file: Path) -> None:
        super().__init__(f"{file.name} is not what it was")
        self.file = file


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files of a model in the order that their digest is made in, as lower-case hex; empty: not pinned to any."""

    files: Sequence[Path]
    digest: str


def is_wanted(request: LoadRequest) -> bool:
    """Whether to try: on CUDA for bases that are not quantized, anywhere for those that the plan has quantized here."""
    if request.device.type == "cuda" and not torch.cuda.is_available():
        return False
    if request.quantization.IS_QUANTIZED:
        return request.quantizer == OWN
    # On a CPU the library maps such tensors, and copies none.
    return request.device.type == "cuda"


def load(request: LoadRequest, loaded: Loaded, source: Source, progress: Progress) -> dict[str, str] | None:
    """Make `loaded.base`, and tell how; None when the library has to. Raises what reading raises, DigestDiffers."""
    try:
        return _Load(request, loaded, source, progress).run()
    except (NoSafetensors, NotTensorForTensor, _PiecesDiffer) as error:
        _LOG.info("the library loads this model: %s", error)
        return None


class _Load:
    """One load on its way."""

    def __init__(self, request: LoadRequest, loaded: Loaded, source: Source, progress: Progress) -> None:
        self._request = request
        self._loaded = loaded
        self._source = source
        self._progress = progress
        self._began = time.perf_counter()
        self._base: Any = None
        self._failed_file: Path | None = None
        self._places: Places
        # Before anything of the files is read.
        self._verification = Verification(request.cache_directory, source.files, source.digest)
        headers = {file: read_header(file) for file in source.files}
        self._starts = {file: start for file, (start, _) in headers.items()}
        self._stored: Mapping[str, StoredTensor] = {
            tensor.name: tensor for _, tensors in headers.values() for tensor in tensors
        }
        # What is not known by a digest is not remembered by it either.
        self._cache = request.cache_directory if source.digest else None
        self._identity = self._identify()

    def run(self) -> dict[str, str]:
        copy = self._find_copy()
        if copy is not None:
            try:
                reading = self._load_copy(copy)
            except _PiecesDiffer as error:
                if error.file != copy.file:
                    raise
                self._drop_copy()
                copy = None
        if copy is None:
            reading = self._load_files()
        self._note("done")
        self._loaded.base = self._base
        self._loaded.stored_dtype = most_common_dtype(self._stored.values())
        return {
            "tensors": str(len(self._stored)),
            "stored_dtype": str(self._loaded.stored_dtype),
            "reader_threads": str(reading.num_threads),
            "read_bytes": str(reading.total_bytes),
            "verified_by": self._verification.by,
            "read_from": "files" if copy is None else "the 4-bit copy",
        }

    def _load_copy(self, copy: prequantized.Copy) -> Reading:
        # Which tensors are quantized, the copy tells: reading begins before a model is made.
        self._places = places_of.make(self._request, self._stored, copy.layout)
        self._note("places")
        copied = (self._copy_task(piece) for piece in copy.pieces)
        try:
            reading = self._read([*self._plain_tasks(), *self._header_tasks(), *copied])
        except OSError as error:
            # Deleted to make room since it was found, or on a bad place of the disk.
            if self._failed_file != copy.file:
                raise
            self._loaded.file = ""
            raise _PiecesDiffer(copy.file) from error
        self._check_copy(copy)
        return reading

    def _check_copy(self, copy: prequantized.Copy) -> None:
        assert self._cache is not None
        assert self._identity is not None
        if not copy.is_unchanged:
            prequantized.renew(self._cache, self._identity, copy)
            return
        try:
            has_changed = copy.has_changed()
        except OSError as error:
            raise _PiecesDiffer(copy.file) from error
        if has_changed:
            raise _PiecesDiffer(copy.file)

    def _load_files(self) -> Reading:
        layout = places_of.lay_out(self._request, self._loaded.config, self._stored)
        self._places = places_of.make(self._request, self._stored, layout)
        self._note("places")
        reading = self._read([*self._plain_tasks(), *self._quantizing_tasks(), *self._header_tasks()])
        self._verification.keep(reading.digests)
        self._keep_copy()
        return reading

    def _note(self, what: str) -> None:
        self._loaded.timings[what] = time.perf_counter() - self._began

    def _read(self, tasks: Iterable[Task]) -> Reading:
        """Everything at its place and verified, and the model over it. Raises _PiecesDiffer, DigestDiffers."""
        verifies_whole = self._verification.by == WHOLE
        # As they lie on the disk: one that is read for the first time is faster from front to back.
        in_order = sorted(tasks, key=lambda task: (task.pieces[0].file, task.pieces[0].offset))
        if self._verification.by == PIECES:
            # Nothing is read unverified because a header moved it to where no digest is known.
            pieces = (piece for task in in_order for piece in task.pieces if piece.file in self._source.files)
            if (piece := next((piece for piece in pieces if piece.digest is None), None)) is not None:
                self._distrust(piece.file)
        with (
            self._running(in_order, hashes=verifies_whole) as reading,
            _hashing(self._source.files if verifies_whole else ()) as hashed,
        ):
            self._base = shell.build(self._request, self._loaded, self._places)
            self._note("model")
            reading.wait(lambda done: self._progress(done, reading.total_bytes, "bytes"))
            self._note("read")
            if reading.differing:
                self._distrust(reading.differing[0].file)
            if verifies_whole:
                self._verify_whole(hashed, reading)
                self._note("hashed")
            if (changed := self._verification.find_changed()) is not None:
                self._distrust(changed)
        return reading

    @contextmanager
    def _running(self, tasks: Sequence[Task], *, hashes: bool) -> Iterator[Reading]:
        reading = Reading(tasks, self._request.device, hashes=hashes)
        interval, collects = sys.getswitchinterval(), gc.isenabled()
        sys.setswitchinterval(_SWITCH_SECONDS)
        # A model is many small objects, none of them garbage: looking for some takes as long as making it.
        gc.disable()
        try:
            reading.start()
            yield reading
        except OSError:
            self._failed_file = reading.failed_file
            if reading.failed_file is not None:
                self._loaded.file = reading.failed_file.name
            raise
        finally:
            reading.close()
            sys.setswitchinterval(interval)
            if collects:
                gc.enable()

    def _distrust(self, file: Path) -> None:
        if file in self._source.files:
            self._verification.forget()
        raise _PiecesDiffer(file)

    def _verify_whole(self, hashed: Sequence[tuple[Path, Future[str]]], reading: Reading) -> None:
        whole = hashlib.sha256()
        for file, future in hashed:
            while not future.done():
                self._progress(reading.total_bytes, reading.total_bytes, "bytes")
                time.sleep(0.01)
            whole.update(f"{file.name}\0{future.result()}\n".encode())
        if whole.hexdigest() != self._source.digest:
            raise DigestDiffers(whole.hexdigest())

    def _identify(self) -> prequantized.Identity | None:
        """Of the 4-bit copy; None where none is kept."""
        if self._cache is None or not self._request.quantization.IS_QUANTIZED:
            return None
        return prequantized.Identity.of(
            self._source.digest,
            self._source.files,
            double=self._request.plan.resolved.quantization.double_quantization,
            rounded=places_of.base_dtype(self._request),
            device=self._request.device,
        )

    def _find_copy(self) -> prequantized.Copy | None:
        # Files that have to be hashed from front to back are all read anyway.
        if self._cache is None or self._identity is None or self._verification.by == WHOLE:
            return None
        return prequantized.find(self._cache, self._identity)

    def _drop_copy(self) -> None:
        assert self._cache is not None
        assert self._identity is not None
        _LOG.warning("the 4-bit copy of weights %s is damaged, and made anew", self._source.digest)
        prequantized.drop(self._cache, self._identity)

    def _keep_copy(self) -> None:
        layout, buffer = self._places.layout, self._places.buffer
        if self._cache is None or self._identity is None or layout.num_bytes < prequantized.SMALLEST_BYTES:
            return
        if psutil.virtual_memory().available < 2 * layout.num_bytes:
            _LOG.warning("no 4-bit copy is kept: the machine has no memory to spare")
            return
        # Nobody changes weights in 4 bits, and nothing of a run waits for their way to the disk.
        self._loaded.copying = prequantized.write_behind(self._cache, self._identity, layout, buffer)

    def _plain_tasks(self) -> Iterator[Task]:
        """One task a piece: nothing holds the pieces of such a tensor together."""
        for name, destination in self._places.plain.items():
            tensor, first = self._stored[name], 0
            for piece in self._pieces(tensor):
                count = piece.num_bytes // tensor.dtype.itemsize
                flat = destination.view(-1)[first : first + count]
                yield PlainTask(pieces=[piece], dtype=tensor.dtype, destination=flat)
                first += count

    def _quantizing_tasks(self) -> Iterator[Task]:
        if not self._places.layout.shapes:
            return
        tables = Tables.on(self._request.device)
        make_ready(tables, places_of.base_dtype(self._request))
        for name, shape in self._places.layout.shapes.items():
            tensor = self._stored[name]
            yield QuantizingTask(
                pieces=self._pieces(tensor),
                dtype=tensor.dtype,
                rounded=places_of.base_dtype(self._request),
                parts=self._places.parts(name),
                tables=tables,
                num_weights=prod(shape),
            )

    def _header_tasks(self) -> Iterator[Task]:
        if self._verification.by not in (PIECES, WHOLE):
            return
        for file, start in self._starts.items():
            yield HashTask(pieces=cut(file, 0, start, self._verification.digests(file)))

    def _copy_task(self, piece: Piece) -> Task:
        destination = self._places.buffer[piece.offset : piece.offset + piece.num_bytes]
        return PlainTask(pieces=[piece], dtype=torch.uint8, destination=destination)

    def _pieces(self, tensor: StoredTensor) -> list[Piece]:
        return cut(tensor.file, tensor.offset, tensor.num_bytes, self._verification.digests(tensor.file))


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
