"""Jobs, and models that they are trained on, for tests of the domain."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from control_service.domain.job import Job
from control_service.domain.node import NodeModel
from control_service.domain.spec import TrainingSpec

SPEC = TrainingSpec(base_model="org/base", model_type="llama", training_type="qlora", traits=(), datasets=())
NOW = datetime(2030, 1, 1, tzinfo=UTC)
JOB_ID = "01J00000000000000000000001"


def make_job(**changes: Any) -> Job:
    """A queued job with whatever differs."""
    job = Job(
        job_id=JOB_ID,
        project_id=1,
        project_name="p",
        spec=SPEC,
        spec_digest=SPEC.digest(),
        output_path="out/x",
        create_time=NOW,
    )
    return replace(job, **changes)


def make_node_model(name: str, *, weights_digest: str = "w", has_chat_template: bool = False) -> NodeModel:
    """A model as a node tells of it."""
    return NodeModel(
        name=name,
        config_type="llama",
        weights_digest=weights_digest,
        size_bytes=1,
        num_parameters=1,
        vocabulary_size=1,
        has_chat_template=has_chat_template,
    )
