"""A full disk costs at most the current save, and nothing needs a restart: a few trials of the scenario `disk-full`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import full_disk

pytestmark = pytest.mark.timeout(300)


@pytest.mark.usefixtures("mount_namespace")
@pytest.mark.parametrize("trial", ["database", "blobs", "save", "journal"])
def test_what_a_full_disk_costs(trial: str, tmp_path: Path) -> None:
    (finding,) = full_disk.run_trial(trial, tmp_path)
    assert finding.violations == ()
    assert finding.tried == finding.held > 0
