"""What a node promises about its engines, a few trials each; `python -m tests.faults` makes the full counts."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fakes.gpu_server import GpuServer
from tests.fakes.hanging import WAYS
from tests.faults.nodes import running_node
from tests.faults.scenarios import cancels, hangs

# Where each of the ways is met.
_PLACES = ("TRAINING", 3, "PLANNING", 2, "SAVING")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GpuServer]:
    """One server for every trial that leaves it as it was."""
    root = tmp_path_factory.mktemp("node")
    with running_node(root, shim_answer_seconds=1) as server:
        yield server


def test_hangs_are_found_by_progress_and_told_with_their_stacks(tmp_path: Path) -> None:
    """A node for each way: they mostly wait, and do so at once."""
    with ExitStack() as stack, ThreadPoolExecutor() as threads:
        limit = hangs.HANG_LIMIT_SECONDS
        nodes = [stack.enter_context(running_node(tmp_path / way, hang_limit_seconds=limit)) for way in WAYS]
        found = threads.map(
            lambda node, way, place: hangs.hang(node, way=way, place=place, job_id="01HANG")[0], nodes, WAYS, _PLACES
        )
        assert list(found) == [[]] * len(WAYS)


@pytest.mark.parametrize("behavior", sorted(set(cancels.BEHAVIORS) - {"shim-is-frozen"}))
def test_cancelled_means_gone(node: GpuServer, behavior: str) -> None:
    problems, _ = cancels.cancel(node, behavior=behavior, job_id=f"01CANCEL{list(cancels.BEHAVIORS).index(behavior)}")
    assert problems == []


def test_a_frozen_shim_is_noticed_and_buried(node: GpuServer) -> None:
    problems, _ = cancels.cancel_behind_a_frozen_shim(node, job_id="01FROZEN")
    assert problems == []
