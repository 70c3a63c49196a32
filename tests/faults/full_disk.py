"""Full disks on purpose: small file systems in memory, in a mount namespace of one child process, and the real services
on them. Run as `python -m tests.faults.full_disk <trial> <directory>` inside such a namespace.

Nothing outside the namespace sees the mounts, and they are gone with its last process. Refuses to fill any other disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from tests.faults.scenario import Finding

_FINDINGS = "findings.json"
_LIMIT_SECONDS = 600.0
_MEBIBYTE = 1024**2
# How a process comes by a mount namespace: as root, or as its own root in a user namespace.
_WAYS: Sequence[Sequence[str]] = (
    ("unshare", "--mount"),
    ("unshare", "--user", "--map-root-user", "--mount"),
)


@cache
def namespace_command() -> tuple[str, ...]:
    """What to put in front of a command to give it a mount namespace in which it may mount; empty where none works."""
    for way in _WAYS:
        probe = [*way, "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /mnt"]
        with contextlib.suppress(FileNotFoundError):
            if subprocess.run(probe, capture_output=True, check=False, timeout=30).returncode == 0:
                return tuple(way)
    return ()


def run_trial(trial: str, directory: Path) -> list[Finding]:
    """Carries out a trial in a namespace of its own. AssertionError with its output when it could not be."""
    way = namespace_command()
    assert way, "this machine permits no mount namespace"
    command = [*way, sys.executable, "-m", "tests.faults.full_disk", trial, str(directory)]
    ended = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=_LIMIT_SECONDS, text=True
    )
    assert ended.returncode == 0, f"trial {trial} ended with {ended.returncode}:\n{ended.stdout[-12000:]}"
    found = json.loads((directory / _FINDINGS).read_text())
    return [Finding(**{**one, "violations": tuple(one["violations"])}) for one in found]


class Volume:
    """A file system of a given size at a directory, which can be filled to the last byte and emptied again."""

    def __init__(self, directory: Path, *, size_bytes: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        options = f"size={size_bytes},mode=0700"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], check=True)
        self.directory = directory
        self._ballast = directory / ".ballast"

    @property
    def free_bytes(self) -> int:
        """What can still be written."""
        found = os.statvfs(self.directory)
        return found.f_bavail * found.f_frsize

    def fill(self, *, leave_bytes: int = 0) -> None:
        """Takes every byte that is left, at once, and gives back `leave_bytes` of them."""
        descriptor = os.open(self._ballast, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            size = _MEBIBYTE
            while size:
                try:
                    os.write(descriptor, b"\0" * size)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    size //= 2
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - leave_bytes)
        finally:
            os.close(descriptor)

    def empty(self) -> None:
        """Gives back what `fill` took."""
        self._ballast.unlink(missing_ok=True)

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Full during the block."""
        self.fill()
        try:
            yield
        finally:
            self.empty()


@dataclass
class Ledger:
    """What a trial tried of R21, and what did not hold."""

    tried: int = 0
    violations: list[str] = field(default_factory=list)
    worst_seconds: float = 0.0

    def hold(self, what: str, holds: object) -> None:
        """Counts one point; `what` is what should be true."""
        self.tried += 1
        if not holds:
            self.violations.append(what)

    def comes_true(self, what: str, condition: Callable[[], object], *, seconds: float = 180.0) -> None:
        """Counts one point that must come true within a limit; remembers the longest wait."""
        start = time.monotonic()
        while not (holds := condition()) and time.monotonic() - start < seconds:
            time.sleep(0.05)
        self.worst_seconds = max(self.worst_seconds, time.monotonic() - start)
        self.hold(what, holds)

    def finding(self) -> Finding:
        """As the runner takes it."""
        return Finding(
            promise="R21",
            tried=self.tried,
            held=self.tried - len(self.violations),
            violations=tuple(self.violations),
            worst=round(self.worst_seconds, 1),
            unit="s",
            what="longest wait for a state after the disk was full, or had room again",
        )


def main(trial: str, directory: Path, trials: Mapping[str, Callable[[Path, Ledger], None]]) -> int:
    """Carries out a trial here, where mounting is allowed."""
    ledger = Ledger()
    trials[trial](directory, ledger)
    (directory / _FINDINGS).write_text(json.dumps([asdict(ledger.finding())]))
    return 0


if __name__ == "__main__":
    # Imported here: it imports this module for what a trial is made of.
    from tests.faults.full_disk_trials import TRIALS

    sys.exit(main(sys.argv[1], Path(sys.argv[2]), TRIALS))
