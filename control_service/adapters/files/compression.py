"""Reads compressed files as streams: told by their first bytes, bounded in what they may become and in memory.

A compression inside another is not looked for.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Final, Protocol

from control_service.domain.dataset_files import FileLimits, Trouble
from control_service.domain.errors import ResourceExhausted

_PIECE_BYTES: Final = 64 * 1024
# An xz file says how much memory it wants: its largest preset takes half of this.
_XZ_MEMORY_BYTES: Final = 128 * 1024**2

_MAGIC: Final[Mapping[bytes, str]] = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


def detect_compression(head: bytes) -> str:
    """The compression of a file that begins so; empty when it is none."""
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")


def decompressed(stream: BinaryIO, *, compression: str, size_bytes: int, limits: FileLimits) -> BinaryIO:
    """The content of a compressed stream of `size_bytes`, from its beginning. Reading raises Trouble for a damaged
    file, ResourceExhausted TOO_LARGE for one that becomes too large."""
    stream.seek(0)
    source = _OPENERS[compression](stream)
    metered = _Metered(source, compression=compression, limit_bytes=limits.decompressed_bytes(size_bytes))
    return io.BufferedReader(metered, _PIECE_BYTES)


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Metered(io.RawIOBase):
    """Counts what comes out, and gives a damaged file's troubles one name."""

    def __init__(self, source: _Readable, *, compression: str, limit_bytes: int) -> None:
        self._source = source
        self._compression = compression
        self._limit_bytes = limit_bytes
        self._num_bytes = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills as much of the buffer as comes at once; 0 at the end."""
        try:
            data = self._source.read(min(len(buffer), _PIECE_BYTES))
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise Trouble(f"the file cannot be decompressed as {self._compression}: {error}") from error
        self._num_bytes += len(data)
        if self._num_bytes > self._limit_bytes:
            raise ResourceExhausted(
                "TOO_LARGE",
                f"the {self._compression} file becomes more than {self._limit_bytes} bytes; no more are taken",
                details={"max_bytes": str(self._limit_bytes), "compression": self._compression},
            )
        buffer[: len(data)] = data
        return len(data)


class _Decompressor(Protocol):
    """What bz2 and lzma have in common."""

    eof: bool
    needs_input: bool
    unused_data: bytes

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Members:
    """Streams that follow each other in one file, each with a decompressor of its own."""

    def __init__(self, stream: BinaryIO, make: Callable[[], Any]) -> None:
        self._stream = stream
        self._make = make
        self._current: _Decompressor | None = None

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end. EOFError when the file ends inside a stream."""
        pending = b""
        while True:
            if self._current is None or self._current.eof:
                pending = self._current.unused_data if self._current is not None else b""
                pending = pending or self._stream.read(_PIECE_BYTES)
                if not pending:
                    return b""
                self._current = self._make()
            elif self._current.needs_input:
                pending = self._stream.read(_PIECE_BYTES)
                if not pending:
                    raise EOFError("it ends too early")
            assert self._current is not None
            data = self._current.decompress(pending, size)
            pending = b""
            if data:
                return data


class _Borrowed(io.RawIOBase):
    """A stream for one who closes what it reads when it is forgotten."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer."""
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _open_gzip(stream: BinaryIO) -> _Readable:
    return gzip.GzipFile(fileobj=stream, mode="rb")


def _open_bzip2(stream: BinaryIO) -> _Readable:
    return _Members(stream, bz2.BZ2Decompressor)


def _open_xz(stream: BinaryIO) -> _Readable:
    return _Members(stream, lambda: lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES))


def _open_zstd(stream: BinaryIO) -> _Readable:
    # Not at the top: it takes a service that never sees such a file 60 MB and 0.2 s.
    import pyarrow

    source: _Readable = pyarrow.CompressedInputStream(_Borrowed(stream), "zstd")
    return source


_OPENERS: Final[Mapping[str, Callable[[BinaryIO], _Readable]]] = {
    "gzip": _open_gzip,
    "bzip2": _open_bzip2,
    "xz": _open_xz,
    "zstd": _open_zstd,
}
