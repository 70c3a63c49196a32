"""A full disk costs at most the current save, and nothing needs a restart: a few trials of the scenario `disk-full`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import full_disk
from tests.faults.conftest import need_namespace

pytestmark = pytest.mark.timeout(300)


@pytest.mark.usefixtures("mount_namespace")
@pytest.mark.parametrize("trial", ["database", "blobs", "backup", "save", "journal"])
def test_what_a_full_disk_costs(trial: str, tmp_path: Path) -> None:
    (finding,) = full_disk.run_trial(trial, tmp_path)
    assert finding.violations == ()
    assert finding.tried == finding.held > 0


def test_a_machine_that_cannot_try_it_is_counted_and_refused_in_ci() -> None:
    with pytest.raises(pytest.skip.Exception, match="FULL DISK NOT TRIED"):
        need_namespace((), {})
    with pytest.raises(pytest.fail.Exception, match="CI must try it"):
        need_namespace((), {"CI": "true"})
    need_namespace(("unshare", "--mount"), {"CI": "true"})
