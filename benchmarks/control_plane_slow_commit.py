"""Control with 5 ms added to every commit, for the benchmark of group commit: `python -m` this with control's flags."""

from __future__ import annotations

import sys
import time

from control_service import main
from control_service.adapters.sql import store

ADDED_SECONDS = 0.005


def _slow(name: str) -> None:
    if name == "store.before-commit":
        time.sleep(ADDED_SECONDS)


if __name__ == "__main__":
    # The one place between the last statement and the commit.
    vars(store)["failpoint"] = _slow
    sys.exit(main.main(sys.argv[1:]))
