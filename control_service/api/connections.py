"""Ends the connections of a server that is about to stop, without a word. Knows no call and waits for nobody.

What has reached a gRPC server and is in nobody's hands yet when it stops is told CANCELLED by grpc itself, which is
no word to call again. A caller whose connection is gone is told UNAVAILABLE.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

_DESCRIPTORS: Final = Path("/proc/self/fd")
# Linux's SO_ATTACH_FILTER, which the socket module has no name for.
_ATTACH_FILTER: Final = 26
# A classic socket filter of one instruction, `ret 0`: no packet is let through.
_LET_NOTHING_THROUGH: Final = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))


def refuse_new(port: int) -> None:
    """Lets no further connection to the port come about; whoever tries is refused once the server stops.

    Shutting the listening socket does that, too, but grpc calls it an error in the log of every clean stop.
    """
    program = struct.pack("HP", 1, ctypes.addressof(_LET_NOTHING_THROUGH))
    for each in _sockets_of(port):
        with each:
            if _listens(each):
                try:
                    each.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, program)
                except OSError:  # a sandbox that permits no filters
                    each.shutdown(socket.SHUT_RDWR)


def hang_up(port: int) -> None:
    """Shuts every connection of this process that has this local port."""
    for each in _sockets_of(port):
        with each, suppress(OSError):  # the other end was faster
            if not _listens(each):
                each.shutdown(socket.SHUT_RDWR)


def _listens(each: socket.socket) -> bool:
    return bool(each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _sockets_of(port: int) -> Iterator[socket.socket]:
    for entry in list(_DESCRIPTORS.iterdir()):
        try:
            if not str(entry.readlink()).startswith("socket:"):
                continue
            # A descriptor of our own: gRPC's may be closed meanwhile.
            copy = socket.socket(fileno=os.dup(int(entry.name)))
        except OSError:  # closed since it was listed
            continue
        if _has_port(copy, port):
            yield copy
        else:
            copy.close()


def _has_port(each: socket.socket, port: int) -> bool:
    if each.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    with suppress(OSError):  # ended meanwhile
        return bool(each.getsockname()[1] == port)
    return False
