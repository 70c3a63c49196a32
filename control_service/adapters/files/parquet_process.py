"""Reads Parquet in a process of its own, since the library is native code and the file anybody's: what would crash it
or take all memory is the file's trouble, not the service's. Parses no Parquet itself."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import IO, Any, BinaryIO, Final

from control_service.domain.dataset_files import FileLimits, SourceRow, Trouble
from control_service.domain.errors import ResourceExhausted

_MODULE: Final = "control_service.adapters.files.parquet_child"
_MEMORY_BYTES: Final = 4 * 1024**3
# Time on a processor: a minute, and a second for so many bytes. Real files take a tenth of it.
_CPU_SECONDS: Final = 60
_BYTES_PER_CPU_SECOND: Final = 1024**2
# Of a line, around its row; and how much a row may grow by being written in ASCII.
_ENVELOPE_BYTES: Final = 1024
_LOOK_SECONDS: Final = 0.1
_GROWTH: Final = 6


@contextmanager
def open_table(
    stream: BinaryIO, limits: FileLimits, size_bytes: int, unwanted: Event
) -> Iterator[tuple[tuple[str, ...], Iterator[SourceRow]]]:
    """(columns, rows) of a file that has a descriptor. Fails as `parquet_table.open_table` does; the process is gone
    when the context ends, and soon after `unwanted` is set, which reads like a reader that died."""
    max_bytes = limits.decompressed_bytes(size_bytes)
    cpu_seconds = _CPU_SECONDS + max_bytes // _BYTES_PER_CPU_SECOND
    numbers = (size_bytes, limits.max_columns, max_bytes, _MEMORY_BYTES, cpu_seconds)
    stream.seek(0)
    with subprocess.Popen(
        # -P: whatever lies in the service's working directory is no part of it.
        [sys.executable, "-P", "-m", _MODULE, *map(str, numbers)],
        stdin=stream,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # Ctrl-C is the service's to hear.
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        lines = _lines(process, process.stdout, limits)
        with _ended_when(unwanted, process):
            first = next(lines)
            yield tuple(first["columns"]), _rows(lines)


@contextmanager
def _ended_when(unwanted: Event, process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kills the process at the end of the context, or before, when nobody wants what it reads: it may work for minutes
    between two lines, and whoever waits for a line looks at nothing else."""
    is_over = Event()

    def watch() -> None:
        while not is_over.wait(_LOOK_SECONDS):
            if unwanted.is_set():
                process.kill()
                return

    watcher = Thread(target=watch, name="parquet-reader-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()
        process.kill()


def _rows(lines: Iterator[Any]) -> Iterator[SourceRow]:
    for number, line in enumerate(lines, start=1):
        if "end" in line:
            return
        if "row" in line:
            yield SourceRow(number=number, line=0, content=line["row"])
        else:
            yield SourceRow(number=number, line=0, trouble=Trouble(line["trouble"], column=line["column"]))


def _lines(process: subprocess.Popen[bytes], output: IO[bytes], limits: FileLimits) -> Iterator[Any]:
    """What the process says; raises what it says of the whole file, or that it ended without a word."""
    most = _GROWTH * limits.max_row_bytes + _ENVELOPE_BYTES
    while raw := output.readline(most):
        if len(raw) == most:
            raise Trouble(f"a row is longer than {limits.max_row_bytes} bytes")
        if not raw.endswith(b"\n"):
            break
        line = json.loads(raw)
        if "damage" in line:
            raise Trouble(line["damage"]["message"], column=line["damage"]["column"])
        if "too_large" in line:
            raise ResourceExhausted("TOO_LARGE", line["too_large"]["message"], details=line["too_large"]["details"])
        yield line
    status = process.wait()
    how = signal.Signals(-status).name if status < 0 else f"status {status}"
    raise Trouble(f"the file cannot be read as Parquet: its reader ended with {how}")
