"""`tunesmith-control backup` and `restore`: arguments, words and exit codes. Copies nothing itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from control_service.backup import BackupError, BackupSummary, make_backup, restore_backup
from control_service.config import Settings
from control_service.data_directory import Taken
from control_service.domain.errors import TunesmithError

_EXIT_FAILED: Final = 1
_EXIT_TAKEN: Final = 3
_DATA_DIRECTORY: Final = Settings.model_fields["data_directory"].default


def main(argv: Sequence[str]) -> int:
    """Runs the command that `argv` begins with; the exit code: 0, 1 when it failed, 3 when a service runs there."""
    name, *rest = argv
    try:
        done, summary = COMMANDS[name](rest)
    except Taken as error:
        sys.stderr.write(f"tunesmith-control {name}: {error}\n")
        return _EXIT_TAKEN
    except (BackupError, TunesmithError, OSError) as error:
        sys.stderr.write(f"tunesmith-control {name}: {error}\n")
        return _EXIT_FAILED
    sys.stdout.write(
        f"{done}: {summary.num_blobs} blobs, {summary.size_bytes:,} bytes, made at {summary.create_time}\n"
    )
    return 0


def _backup(argv: Sequence[str]) -> tuple[str, BackupSummary]:
    parser = argparse.ArgumentParser(
        prog="tunesmith-control backup",
        description="Copies the data of a control service, which may run. Into an earlier backup only what is new.",
    )
    parser.add_argument("--data-directory", type=Path, default=_DATA_DIRECTORY, help="the service's own")
    parser.add_argument("--to", type=Path, required=True, help="directory of the backup; empty, new, or an earlier one")
    given = parser.parse_args(list(argv))
    return f"backed up to {given.to}", make_backup(data_directory=given.data_directory, target=given.to)


def _restore(argv: Sequence[str]) -> tuple[str, BackupSummary]:
    parser = argparse.ArgumentParser(
        prog="tunesmith-control restore",
        description="Puts a backup into a data directory that has no database yet; verifies every byte.",
    )
    parser.add_argument("--from", dest="source", type=Path, required=True, help="directory of the backup")
    parser.add_argument("--data-directory", type=Path, default=_DATA_DIRECTORY, help="where the service will run")
    parser.add_argument("--output-root", type=Path, help="where artifacts go; default <data-directory>/output")
    given = parser.parse_args(list(argv))
    summary = restore_backup(
        source=given.source,
        data_directory=given.data_directory,
        output_root=given.output_root or given.data_directory / "output",
    )
    return f"restored to {given.data_directory}", summary


COMMANDS: Final[Mapping[str, Callable[[Sequence[str]], tuple[str, BackupSummary]]]] = {
    "backup": _backup,
    "restore": _restore,
}
