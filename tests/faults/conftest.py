"""What fault tests need of the machine. A machine without it skips them, and says so; in CI that is a failure."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import pytest

from tests.faults.full_disk import namespace_command


def need_namespace(way: Sequence[str], environment: Mapping[str, str]) -> None:
    """Skips where there is no way to a mount namespace, and fails there in CI: what nobody tried holds nothing."""
    if way:
        return
    reason = "FULL DISK NOT TRIED: this machine permits no mount namespace (unshare --mount)"
    if environment.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"{reason}, and CI must try it")
    pytest.skip(reason)


@pytest.fixture
def mount_namespace() -> None:
    """The machine permits a mount namespace of its own, in which a small file system can be made and filled."""
    need_namespace(namespace_command(), os.environ)
