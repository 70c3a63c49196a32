"""Ends the connections of a server that is about to stop, without a word. Knows no call and waits for nobody.

What has reached a gRPC server and is in nobody's hands yet when it stops is told CANCELLED by grpc itself, which is
no word to call again. A caller whose connection is gone is told UNAVAILABLE.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

_DESCRIPTORS: Final = Path("/proc/self/fd")


def hang_up(port: int) -> int:
    """Shuts every socket of this process that has this local port, the listening one first; gives how many."""
    found = list(_sockets_of(port))
    found.sort(key=lambda each: not each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    for each in found:
        with each, suppress(OSError):  # the other end was faster
            each.shutdown(socket.SHUT_RDWR)
    return len(found)


def _sockets_of(port: int) -> Iterator[socket.socket]:
    for entry in _DESCRIPTORS.iterdir():
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
