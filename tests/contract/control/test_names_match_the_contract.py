"""The domain, the state tables and the proto use the same words for the same things."""

from __future__ import annotations

from enum import Enum
from typing import Any

import pytest

from control_service.domain import retry
from control_service.domain.artifact import ArtifactKind, CheckpointStatus
from control_service.domain.event import EventKind
from control_service.domain.failure import Fault
from control_service.domain.job import WaitReason
from control_service.domain.job_state import TRANSITIONS, JobState
from control_service.domain.node import NodeState
from control_service.domain.run import Phase, RunState, StopMode
from tunesmith.common.v1 import errors_pb2, event_pb2
from tunesmith.control.v1 import job_service_pb2, node_service_pb2
from tunesmith.gpu.v1 import run_service_pb2

PAIRS: list[tuple[type[Enum], Any, str]] = [
    (JobState, event_pb2.JobState, "JOB_STATE_"),
    (RunState, event_pb2.RunState, "RUN_STATE_"),
    (Phase, event_pb2.Phase, "PHASE_"),
    (CheckpointStatus, event_pb2.CheckpointStatus, "CHECKPOINT_STATUS_"),
    (ArtifactKind, event_pb2.ArtifactKind, "ARTIFACT_KIND_"),
    (EventKind, event_pb2.EventKind, "EVENT_KIND_"),
    (Fault, errors_pb2.Fault, "FAULT_"),
    (WaitReason, job_service_pb2.WaitReason, "WAIT_REASON_"),
    (NodeState, node_service_pb2.NodeState, "NODE_STATE_"),
    (StopMode, run_service_pb2.StopMode, "STOP_MODE_"),
]


@pytest.mark.parametrize(("ours", "wire", "prefix"), PAIRS, ids=[pair[0].__name__ for pair in PAIRS])
def test_names(ours: type[Enum], wire: Any, prefix: str) -> None:
    names = {name.removeprefix(prefix) for name in wire.keys()}  # noqa: SIM118 - an enum wrapper has no iteration
    assert {member.name for member in ours} | {"UNSPECIFIED"} == names


def test_event_kinds_have_the_numbers_of_the_contract() -> None:
    for kind in EventKind:
        assert event_pb2.EventKind.Value(f"EVENT_KIND_{kind.name}") == kind.value


def test_the_state_table_knows_every_public_state() -> None:
    names = {name.removeprefix("JOB_STATE_") for name in event_pb2.JobState.keys()} - {"UNSPECIFIED"}  # noqa: SIM118
    assert {state.name for state in TRANSITIONS} == names


def test_every_retried_reason_is_one_of_the_contract() -> None:
    names = {name.removeprefix("ERROR_REASON_") for name in errors_pb2.ErrorReason.keys()}  # noqa: SIM118
    assert names >= retry.RETRIED_REASONS
