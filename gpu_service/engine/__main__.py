"""`python -m gpu_service.engine --control-fd N`: hands the command line to the entry point and does nothing else."""

from __future__ import annotations

import sys

from gpu_service.engine.entrypoint import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
