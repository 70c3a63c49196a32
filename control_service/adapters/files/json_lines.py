"""Reads JSON lines: one object a line. A line that is too long ends the reading; nothing else does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from control_service.adapters.files.detection import BYTE_ORDER_MARK
from control_service.domain.dataset_files import FileLimits, SourceRow, Trouble
from control_service.domain.json_text import JsonParser


def read(stream: BinaryIO, limits: FileLimits) -> Iterator[SourceRow]:
    """The rows of every line that is not blank. Raises Trouble for a line that is longer than a row may be."""
    parser = JsonParser(limits)
    line = number = 0
    while raw := stream.readline(limits.max_row_bytes + 1):
        line += 1
        if len(raw) > limits.max_row_bytes:
            raise Trouble(f"is longer than {limits.max_row_bytes} bytes", line=line)
        if line == 1:
            raw = raw.removeprefix(BYTE_ORDER_MARK)
        if not raw.strip():
            continue
        number += 1
        try:
            content = parser.parse_object(raw.rstrip(b"\r\n").decode())
        except UnicodeDecodeError as error:
            trouble = Trouble(f"is not UTF-8 at byte {error.start + 1}", column=str(_characters(raw, error.start) + 1))
            yield SourceRow(number=number, line=line, trouble=trouble)
        except Trouble as trouble:
            yield SourceRow(number=number, line=line, trouble=trouble)
        else:
            yield SourceRow(number=number, line=line, content=content)


def _characters(raw: bytes, end: int) -> int:
    return len(raw[:end].decode(errors="replace"))
