"""Reads a run's journal by what docs/architecture.md says of it, not by the product's code.

A record is u32 length of the event, u32 CRC-32 over sequence and event, u64 sequence, event: all little-endian.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

from tunesmith.common.v1 import event_pb2

_HEADER_BYTES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Journal:
    """Whole records in order, and how many bytes lie behind the last of them (a torn tail)."""

    events: tuple[event_pb2.EncodedEvent, ...]
    num_torn_bytes: int


def read_journal(path: Path) -> Journal:
    """The journal's whole records. Raises OSError."""
    data = path.read_bytes()
    events: list[event_pb2.EncodedEvent] = []
    offset = 0
    while len(data) - offset >= _HEADER_BYTES:
        length = int.from_bytes(data[offset : offset + 4], "little")
        checksum = int.from_bytes(data[offset + 4 : offset + 8], "little")
        sequence = int.from_bytes(data[offset + 8 : offset + 16], "little")
        end = offset + _HEADER_BYTES + length
        if sequence != len(events) + 1 or length == 0 or end > len(data):
            break
        # The sequence and the event lie one after the other.
        if zlib.crc32(data[offset + 8 : end]) != checksum:
            break
        events.append(event_pb2.EncodedEvent.FromString(data[offset + _HEADER_BYTES : end]))
        offset = end
    return Journal(events=tuple(events), num_torn_bytes=len(data) - offset)
