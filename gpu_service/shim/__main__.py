"""`python -m gpu_service.shim <engine directory>` starts an engine; `--bury` closes the books of one that is gone.

Exit codes: 0 when the engine's end is on record, 2 for an engine directory that cannot be used, 3 when another shim
has it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gpu_service.shim.bury import bury
from gpu_service.shim.configuration import EngineConfiguration, EngineDirectoryInvalid
from gpu_service.shim.lock import AlreadyHeld, hold
from gpu_service.shim.loop import Shim


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
                bury(directory, stop_mode=options.stop_mode)
                return 0
            return Shim(directory=directory, configuration=EngineConfiguration.read(directory)).run()
    except AlreadyHeld as error:
        sys.stderr.write(f"{error}\n")
        return 3
    except EngineDirectoryInvalid as error:
        sys.stderr.write(f"{error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
