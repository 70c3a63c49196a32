"""What a StartTraining request says that its job starts from."""

from __future__ import annotations

import pytest

from control_service.api.wire.jobs import start_request
from control_service.app.start_points import StartRequest
from control_service.domain.errors import InvalidArgument
from tunesmith.control.v1.job_service_pb2 import StartTrainingRequest


def test_nothing_a_job_or_a_checkpoint_of_it() -> None:
    assert start_request(StartTrainingRequest(project_id=1)) is None
    assert start_request(StartTrainingRequest(start_from_job_id="01J")) == StartRequest(job_id="01J")
    both = StartTrainingRequest(start_from_job_id="01J", start_from_checkpoint="step-00000020")
    assert start_request(both) == StartRequest(job_id="01J", checkpoint="step-00000020")


def test_a_checkpoint_of_no_job_is_refused() -> None:
    with pytest.raises(InvalidArgument) as refused:
        start_request(StartTrainingRequest(start_from_checkpoint="step-00000020"))
    assert [violation.field for violation in refused.value.violations] == ["start_from_job_id"]
