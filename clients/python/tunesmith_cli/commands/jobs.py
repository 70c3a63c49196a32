"""`tunesmith jobs`: what was asked for and how it stands."""

from typing import Annotated

import typer

from tunesmith.common.v1 import event_pb2
from tunesmith.control.v1 import job_service_pb2
from tunesmith_cli.describe import failure_text, loss_text, phase_name
from tunesmith_cli.lookup import find_project
from tunesmith_cli.session import Session, command
from tunesmith_cli.text import duration, moment
from tunesmith_client import state_name

app = typer.Typer(help="Requests to train.", no_args_is_help=True)

COLUMNS = ("ID", "PROJECT", "STATE", "STEP", "LOSS", "NODE", "CREATED", "REMARK")
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job.")]

STATES = {
    value.name.removeprefix("JOB_STATE_").lower(): value.number
    for value in event_pb2.JobState.DESCRIPTOR.values
    if value.number
}


def remark(job: job_service_pb2.Job) -> str:
    """Why a job waits or failed, or that its node does not answer."""
    if job.HasField("failure") and job.state == event_pb2.JOB_STATE_FAILED:
        return failure_text(job.failure)
    if job.node_unreachable:
        return "its node does not answer"
    if job.state == event_pb2.JOB_STATE_QUEUED:
        position = f"position {job.queue_position}" if job.queue_position else ""
        reason = job_service_pb2.WaitReason.Name(job.wait_reason).removeprefix("WAIT_REASON_")
        return " ".join(part for part in (position, job.wait_message or (reason if job.wait_reason else "")) if part)
    return ""


def row(job: job_service_pb2.Job) -> tuple[object, ...]:
    """A job as a row of COLUMNS."""
    progress = job.progress
    state = state_name(job.state)
    if job.state == event_pb2.JOB_STATE_RUNNING and job.phase:
        state = f"{state} ({phase_name(job.phase)})"
    return (
        job.job_id,
        f"{job.project_name or job.project_id}",
        state,
        f"{progress.step}/{progress.total_steps}" if progress.total_steps else "",
        loss_text(progress.loss) if progress.HasField("loss") else "",
        job.node,
        moment(job.create_time),
        remark(job),
    )


@command(app, "list")
def list_jobs(
    session: Session,
    project: Annotated[str, typer.Option("--project", help="Only jobs of this project (name or id).")] = "",
    state: Annotated[
        list[str] | None, typer.Option("--state", help="Only jobs in this state; may be given again.")
    ] = None,
) -> None:
    """Lists jobs, newest first."""
    wanted = [name.lower() for name in state or ()]
    for name in wanted:
        if name not in STATES:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(STATES)}", param_hint="--state")
    project_id = find_project(session.client, project).project_id if project else 0
    states = [event_pb2.JobState.Value(f"JOB_STATE_{name.upper()}") for name in wanted]
    jobs = list(session.client.jobs.list(project_id=project_id, states=states))
    session.out.table(COLUMNS, map(row, jobs), jobs)


@command(app, "show")
def show(session: Session, job: JobArgument) -> None:
    """Shows one job: state, queue position, why it waits, progress, failure."""
    found = session.client.jobs.get(job)
    progress = found.progress
    lines: list[tuple[str, object]] = [
        ("id", found.job_id),
        ("project", f"{found.project_name} ({found.project_id})"),
        ("state", row(found)[2]),
        ("remark", remark(found)),
        ("node", found.node),
        ("attempt", found.attempt),
        ("step", row(found)[3]),
        ("loss", row(found)[4]),
        ("remaining", duration(progress.remaining_seconds) if progress.remaining_seconds else ""),
        ("output path", found.output_path),
        ("weights digest", found.weights_digest),
        ("created", moment(found.create_time)),
        ("started", moment(found.start_time)),
        ("ended", moment(found.end_time)),
        ("retry of", found.retry_of_job_id),
        ("events", found.last_sequence),
    ]
    session.out.message(found, lines)


@command(app, "checkpoints")
def checkpoints(session: Session, job: JobArgument) -> None:
    """Lists a job's checkpoints by step."""
    found = session.client.jobs.checkpoints(job)
    rows = (
        (
            checkpoint.name,
            checkpoint.step,
            checkpoint.attempt,
            event_pb2.CheckpointStatus.Name(checkpoint.status).removeprefix("CHECKPOINT_STATUS_"),
            checkpoint.node,
            loss_text(checkpoint.held_out_loss) if checkpoint.HasField("held_out_loss") else "",
            "best" if checkpoint.best else "",
            moment(checkpoint.create_time),
        )
        for checkpoint in found
    )
    session.out.table(("NAME", "STEP", "ATTEMPT", "STATUS", "NODE", "HELD-OUT", "", "CREATED"), rows, found)


@command(app, "delete")
def delete(session: Session, job: JobArgument) -> None:
    """Deletes a job that is over, with its log and artifacts."""
    session.client.jobs.delete(job)
    session.out.remark(f"deleted job {job}")
