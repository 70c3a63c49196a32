"""The process that reads one Parquet file: standard input to JSON lines on standard output, in limited memory and time.

A line is `{"columns": [...]}` (the first), `{"row": {...}}`, `{"trouble": "...", "column": "..."}` (of one row),
`{"damage": {...}}` or `{"too_large": {...}}` (nothing follows), `{"end": true}` (the last). Keeps nothing.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import replace
from typing import Any, BinaryIO

from control_service.domain.dataset_files import FileLimits, Trouble
from control_service.domain.errors import ResourceExhausted


def main(size_bytes: int, max_columns: int, max_bytes: int, memory_bytes: int, cpu_seconds: int) -> None:
    """Reads standard input to its end or to where it can be read no further. The kernel ends it after `cpu_seconds`."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    # Native code that spins is ended too; nobody could cancel it.
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The library's own pools reserve far more address space than they use.
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"
    # Imported here since it obeys both.
    from control_service.adapters.files import parquet_table

    # The caller has worked out what a file of this size may become.
    limits = replace(
        FileLimits(), max_columns=max_columns, max_decompressed_bytes=max_bytes, ratio_floor_bytes=max_bytes
    )
    try:
        with open(0, "rb", closefd=False) as stream:
            _write_rows(parquet_table.open_table(stream, limits, size_bytes))
    except Trouble as trouble:
        _write({"damage": {"message": trouble.message, "column": trouble.column}})
    except ResourceExhausted as error:
        _write({"too_large": {"message": error.message, "details": dict(error.details)}})
    except MemoryError:
        _write({"damage": {"message": f"reading it takes more than {memory_bytes} bytes of memory", "column": ""}})
    sys.stdout.buffer.flush()


def _write_rows(table: Any) -> None:
    columns, rows = table
    _write({"columns": columns})
    for row in rows:
        if row.trouble is None:
            _write({"row": row.content})
        else:
            _write({"trouble": row.trouble.message, "column": row.trouble.column})
    _write({"end": True})


def _write(line: dict[str, Any]) -> None:
    # Not a number and half a surrogate pair travel; the one who reads refuses them.
    output: BinaryIO = sys.stdout.buffer
    output.write(json.dumps(line).encode() + b"\n")


if __name__ == "__main__":
    try:
        main(*map(int, sys.argv[1:]))
    except BrokenPipeError:
        # Whoever asked wants no more of it. What is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
