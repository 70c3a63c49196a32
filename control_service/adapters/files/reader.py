"""Implements `app.ports.DatasetFiles`: finds out what a file is and opens the reader for it. Parses nothing itself."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import BinaryIO, Final, cast

from control_service.adapters.blobs.disk_errors import disk_errors
from control_service.adapters.files import csv_table, json_array, json_lines, parquet_process
from control_service.adapters.files.compression import decompressed, detect_compression
from control_service.adapters.files.detection import HEAD_BYTES, detect_format
from control_service.domain.dataset_files import CSV, JSON, PARQUET, FileLimits, OpenedFile, SourceRow, Trouble

_COPY_BYTES: Final = 1024**2
_Table = tuple[tuple[str, ...], Iterator[SourceRow]]
OpenParquet = Callable[[BinaryIO, FileLimits, int, Event], AbstractContextManager[_Table]]


class DatasetFileReader:
    """Opens files of datasets. `spool_directory`: where a compressed Parquet file is unpacked, since it is read from
    its end; the file there has no name, so nothing stays behind."""

    def __init__(
        self, *, limits: FileLimits, spool_directory: Path, open_parquet: OpenParquet = parquet_process.open_table
    ) -> None:
        self._limits = limits
        self._spool_directory = spool_directory
        self._open_parquet = open_parquet

    @contextmanager
    def open(self, stream: BinaryIO, *, size_bytes: int, unwanted: Event) -> Iterator[OpenedFile]:
        """See the port."""
        with ExitStack() as stack:
            compression = detect_compression(stream.read(8))

            def content() -> BinaryIO:
                """The file's content, from its beginning."""
                if not compression:
                    stream.seek(0)
                    return stream
                return decompressed(stream, compression=compression, size_bytes=size_bytes, limits=self._limits)

            yield self._opened(content, compression, size_bytes, unwanted, stack)

    def _opened(
        self,
        content: Callable[[], BinaryIO],
        compression: str,
        size_bytes: int,
        unwanted: Event,
        stack: ExitStack,
    ) -> OpenedFile:
        try:
            file_format = detect_format(content().read(HEAD_BYTES))
        except Trouble as trouble:
            return _unreadable("unknown", compression, trouble)
        try:
            if file_format == PARQUET:
                whole = stack.enter_context(self._spooled(content())) if compression else content()
                columns, rows = stack.enter_context(self._open_parquet(whole, self._limits, size_bytes, unwanted))
            elif file_format == CSV:
                columns, rows = csv_table.open_table(content(), self._limits)
            else:
                read = json_array.read if file_format == JSON else json_lines.read
                columns, rows = (), read(content(), self._limits)
        except Trouble as trouble:
            return _unreadable(file_format, compression, trouble)
        return OpenedFile(file_format=file_format, compression=compression, columns=columns, rows=rows)

    @contextmanager
    def _spooled(self, content: BinaryIO) -> Iterator[BinaryIO]:
        with tempfile.TemporaryFile(dir=self._spool_directory) as file:
            with disk_errors("the unpacked file"):
                shutil.copyfileobj(content, file, _COPY_BYTES)
            file.seek(0)
            yield cast("BinaryIO", file)


def _unreadable(file_format: str, compression: str, trouble: Trouble) -> OpenedFile:
    """A file of which no row can be read, so that its trouble is told as a row's would be."""

    def rows() -> Iterator[SourceRow]:
        yield from ()
        raise trouble

    return OpenedFile(file_format=file_format, compression=compression, columns=(), rows=rows())
