"""The 4-bit copy of a base that a node keeps in its cache: one file of bytes, and a manifest that says of what.

Believed only where everything that made it is the same: the weights' digest, the files as they lie there, this format,
the quantizer, the type that was quantized from, the kind of device, and the libraries' versions. Its pieces have
digests, which whoever reads it compares, unless the file is still what it was when they were made. Written beside its
place and renamed, behind the run's back: a copy that cannot be written costs time at the next start and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

from gpu_service.catalog.known_files import FileIdentity
from gpu_service.engine import durable, room
from gpu_service.engine.reading.flat_nf4 import Layout
from gpu_service.engine.reading.piece_digests import seal, unseal
from gpu_service.engine.reading.reader import PIECE_BYTES, Piece

_LOG = logging.getLogger(__name__)
DIRECTORY = "prequantized"
_FORMAT = 2
# Of what `fast_path.quantizing` and `flat_nf4` make: to be raised when either makes other bits or lays them out anew.
_QUANTIZER = 2
_DATA_FILE, _MANIFEST_FILE = "data", "manifest"
# At least what a local file system dates files by.
_CLOCK_TICK_SECONDS = 0.02
_STAGING_PREFIX = ".staging-"
# A smaller one is quantized as fast as it is read.
SMALLEST_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Everything that the bits depend on. `sources` has size and modification time of the files, by name."""

    weights_digest: str
    double: bool
    rounded: str
    device_type: str
    sources: Mapping[str, tuple[int, int]]

    @classmethod
    def of(
        cls, weights_digest: str, files: Sequence[Path], *, double: bool, rounded: torch.dtype, device: torch.device
    ) -> Identity:
        """Raises OSError."""
        statuses = {file.name: file.stat() for file in files}
        return cls(
            weights_digest=weights_digest,
            double=double,
            rounded=str(rounded),
            device_type=device.type,
            sources={name: (status.st_size, status.st_mtime_ns) for name, status in statuses.items()},
        )

    def describe(self) -> dict[str, object]:
        """As the manifest has it."""
        return json.loads(json.dumps(asdict(self))) | {
            "format": _FORMAT,
            "quantizer": _QUANTIZER,
            "torch": torch.__version__,
            "bitsandbytes": metadata.version("bitsandbytes"),
        }

    @property
    def name(self) -> str:
        """Of its directory: a copy that only an older version would believe is another one, and ages there."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Copy:
    """What is in the buffer, and the pieces of its file: with their digests, unless nobody touched it (`is_unchanged`).

    `file_identity` is from before anything of it was read.
    """

    layout: Layout
    file: Path
    file_identity: FileIdentity
    is_unchanged: bool
    pieces: Sequence[Piece]

    def has_changed(self) -> bool:
        """Since it was found: what was read may be of either. Raises OSError."""
        return FileIdentity.of(self.file) != self.file_identity


def find(cache_directory: Path, identity: Identity) -> Copy | None:
    """The copy; None when there is none, or it is not to be believed."""
    directory = cache_directory / DIRECTORY / identity.name
    data = directory / _DATA_FILE
    try:
        manifest = unseal((directory / _MANIFEST_FILE).read_bytes())
        if manifest["identity"] != identity.describe():
            raise ValueError("it is of other weights or another version")
        shapes = {name: tuple(shape) for name, shape in manifest["shapes"].items()}
        layout = Layout.of(shapes, double=identity.double)
        num_bytes = layout.num_bytes
        file_identity = FileIdentity.of(data)
        if file_identity.size_bytes != num_bytes:
            raise ValueError(f"it has not the {num_bytes} bytes that it should have")
        digests = [bytes.fromhex(digest) for digest in manifest["pieces"]]
        is_unchanged = manifest["file"] == file_identity.to_json()
        offsets = range(0, num_bytes, PIECE_BYTES)
        pieces = [
            Piece(
                file=data,
                offset=offset,
                num_bytes=min(PIECE_BYTES, num_bytes - offset),
                digest=None if is_unchanged else digest,
            )
            for offset, digest in zip(offsets, digests, strict=True)
        ]
        os.utime(directory)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _LOG.warning("the 4-bit copy %s is ignored: %s", directory, error)
        drop(cache_directory, identity)
        return None
    return Copy(layout=layout, file=data, file_identity=file_identity, is_unchanged=is_unchanged, pieces=pieces)


def renew(cache_directory: Path, identity: Identity, copy: Copy) -> None:
    """Every piece had its digest although the file is another: moved, restored or touched. Remember it as it is."""
    if not copy.file_identity.is_settled() or copy.has_changed():
        return
    path = cache_directory / DIRECTORY / identity.name / _MANIFEST_FILE
    staged = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        manifest = unseal(path.read_bytes())
        staged.write_bytes(seal(manifest | {"file": copy.file_identity.to_json()}))
        staged.replace(path)
    except (OSError, ValueError) as error:
        staged.unlink(missing_ok=True)
        _LOG.warning("the 4-bit copy %s is hashed again the next time: %s", path.parent, error)


def drop(cache_directory: Path, identity: Identity) -> None:
    """Delete a copy that is damaged; the next one takes its place."""
    shutil.rmtree(cache_directory / DIRECTORY / identity.name, ignore_errors=True)


def write_behind(cache_directory: Path, identity: Identity, layout: Layout, content: torch.Tensor) -> threading.Thread:
    """Write `content`, uint8 [n] that nobody changes, in a thread that holds up nobody's end.

    It is in host memory before it is written, so that its device has the memory back when the model goes.
    """
    stream = None
    if content.device.type == "cuda":
        stream = torch.cuda.Stream(content.device)
        stream.wait_stream(torch.cuda.current_stream(content.device))
    thread = threading.Thread(
        target=_write,
        args=(cache_directory, identity, layout, [content], stream),
        name="prequantized-copy",
        daemon=True,
    )
    del content
    thread.start()
    return thread


def _to_host(content: torch.Tensor, stream: torch.cuda.Stream | None) -> torch.Tensor:
    """Through a pinned buffer, and beside whatever else the device does."""
    if stream is None:
        return content
    host = torch.empty(len(content), dtype=torch.uint8)
    pinned = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
    with torch.cuda.stream(stream):
        for offset in range(0, len(content), PIECE_BYTES):
            piece = content[offset : offset + PIECE_BYTES]
            pinned[: len(piece)].copy_(piece, non_blocking=True)
            stream.synchronize()
            host[offset : offset + len(piece)].copy_(pinned[: len(piece)])
    return host


def _write(
    cache_directory: Path,
    identity: Identity,
    layout: Layout,
    taken: list[torch.Tensor],
    stream: torch.cuda.Stream | None,
) -> None:
    # A thread keeps its arguments until it ends; what is on a device must not wait for the disk.
    content = _to_host(taken.pop(), stream)
    parent = cache_directory / DIRECTORY
    staging = parent / f"{_STAGING_PREFIX}{secrets.token_hex(8)}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        room.require(parent, len(content))
        staging.mkdir()
        view = memoryview(content.numpy())  # type: ignore[arg-type]
        digests = []
        with (staging / _DATA_FILE).open("wb", buffering=0) as file:
            for offset in range(0, len(view), PIECE_BYTES):
                piece = view[offset : offset + PIECE_BYTES]
                digests.append(hashlib.sha256(piece).hexdigest())
                _write_whole(file.fileno(), piece)
        durable.sync(staging / _DATA_FILE)
        manifest = {
            "identity": identity.describe(),
            "shapes": dict(layout.shapes),
            "pieces": digests,
            # Nobody else knows of the file yet.
            "file": FileIdentity.of(staging / _DATA_FILE).to_json(),
        }
        (staging / _MANIFEST_FILE).write_bytes(seal(manifest))
        for path in (staging / _MANIFEST_FILE, staging):
            durable.sync(path)
        # Whatever happens to it at its place has another time of change.
        time.sleep(_CLOCK_TICK_SECONDS)
        staging.rename(parent / identity.name)
        durable.sync(parent)
    except OSError as error:
        # No room, or another engine was first.
        shutil.rmtree(staging, ignore_errors=True)
        _LOG.warning("no 4-bit copy was kept: %s", error)


def _write_whole(descriptor: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(descriptor, piece) :]
