"""`python -m gpu_service.shim <engine directory>` starts an engine; `--bury` closes the books of one that is gone.

Exit codes: 0 when the engine's end is on record, 2 for an engine directory that cannot be used, 3 when another shim
has it, 4 when the disk has no room for the shim's files.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from pathlib import Path

from gpu_service.shim.configuration import EngineDirectoryInvalid
from gpu_service.shim.lock import AlreadyHeld, hold
from gpu_service.shim.records import EXIT_DISK_FULL
from gpu_service.shim.starting import start


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu_service.shim", description=__doc__)
    parser.add_argument("directory", type=Path, help="engine directory, with engine.json")
    parser.add_argument("--bury", action="store_true", help="end what is left of an engine whose shim is gone")
    parser.add_argument("--stop-mode", choices=("cancel", "checkpoint"), help="with --bury: what its run was asked for")
    options = parser.parse_args(arguments)
    directory: Path = options.directory.absolute()
    try:
        with hold(directory / "shim.lock"):
            if options.bury:
                from gpu_service.shim.bury import bury

                bury(directory, stop_mode=options.stop_mode)
                return 0
            started = start(directory)
            # The journal and the contract take most of a shim's start; the engine's own goes on meanwhile. They are
            # imported now, and not when they are wanted: other files may lie there by then.
            from gpu_service.shim.loop import Shim

            return Shim(started).run()
    except AlreadyHeld as error:
        sys.stderr.write(f"{error}\n")
        return 3
    except EngineDirectoryInvalid as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # Past the interpreter's buffers: what they cannot write when it ends would change the exit status.
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), f"{error}\n".encode())
        return EXIT_DISK_FULL


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
