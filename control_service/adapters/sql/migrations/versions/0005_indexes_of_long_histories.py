"""Indexes by which what is asked with every job that moves, and a page of a listing, costs the same in a long history.
Rows stay as they are."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Those of jobs get the listings' order; checkpoints and references are found by what they are asked for."""
    op.drop_index(op.f("ix_jobs_state"), table_name="jobs")
    op.drop_index(op.f("ix_jobs_project_id"), table_name="jobs")
    op.create_index(op.f("ix_jobs_project_id_job_id"), "jobs", ["project_id", "job_id"])
    op.create_index(op.f("ix_jobs_state_job_id"), "jobs", ["state", "job_id"])
    op.create_index(op.f("ix_checkpoints_status"), "checkpoints", ["status"])
    op.create_index(op.f("ix_blob_references_holder"), "blob_references", ["holder"])


def downgrade() -> None:
    """As they were."""
    op.drop_index(op.f("ix_blob_references_holder"), table_name="blob_references")
    op.drop_index(op.f("ix_checkpoints_status"), table_name="checkpoints")
    op.drop_index(op.f("ix_jobs_state_job_id"), table_name="jobs")
    op.drop_index(op.f("ix_jobs_project_id_job_id"), table_name="jobs")
    op.create_index(op.f("ix_jobs_project_id"), "jobs", ["project_id"])
    op.create_index(op.f("ix_jobs_state"), "jobs", ["state"])
