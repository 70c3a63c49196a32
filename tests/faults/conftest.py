"""What fault tests need of the machine. A machine without it skips them, and says so; in CI that is a failure."""

from __future__ import annotations

import os

import pytest

from tests.faults.full_disk import namespace_command


@pytest.fixture
def mount_namespace() -> None:
    """The machine permits a mount namespace of its own, in which a small file system can be made and filled."""
    if namespace_command():
        return
    reason = "FULL DISK NOT TRIED: this machine permits no mount namespace (unshare --mount)"
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"{reason}, and CI must try it")
    pytest.skip(reason)
