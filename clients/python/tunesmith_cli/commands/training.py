"""The verbs of training, at the top of the command line: plan, start, watch, logs, cancel, pause, resume, retry."""

from collections.abc import Callable
from typing import Annotated

import typer

from tunesmith.common.v1 import event_pb2, plan_pb2
from tunesmith.control.v1 import job_service_pb2
from tunesmith_cli.commands.jobs import COLUMNS, JobArgument, row
from tunesmith_cli.commands.projects import ProjectArgument
from tunesmith_cli.describe import describe
from tunesmith_cli.exit_codes import ExitCode
from tunesmith_cli.follow import follower_for
from tunesmith_cli.lookup import dataset_names, find_project
from tunesmith_cli.plan_table import show_plan
from tunesmith_cli.session import Session, command
from tunesmith_client import Client

JobVerb = Callable[[Client, str], job_service_pb2.Job]


def add_to(app: typer.Typer) -> None:
    """Registers the verbs."""
    command(app, "plan")(plan)
    command(app, "start")(start)
    command(app, "watch")(watch)
    command(app, "logs")(logs)
    verbs: dict[str, tuple[str, JobVerb]] = {
        "cancel": ("Asks for the end of a job.", lambda client, job: client.jobs.cancel(job)),
        "pause": ("Asks a running job to checkpoint and free its device.", lambda client, job: client.jobs.pause(job)),
        "resume": ("Queues a paused job again.", lambda client, job: client.jobs.resume(job)),
        "retry": (
            "Starts a new job with the snapshot of one that failed or was cancelled.",
            lambda client, job: client.jobs.retry(job),
        ),
    }
    for name, (help_text, verb) in verbs.items():
        command(app, name)(_job_command(help_text, verb))


def plan(
    session: Session,
    project: ProjectArgument,
    check: Annotated[bool, typer.Option("--check", help="Read no data: catalog, model files and memory only.")] = False,
    probe_memory: Annotated[
        bool,
        typer.Option(
            "--probe-memory", help="Load the base on a free device, and measure two steps on the longest batch."
        ),
    ] = False,
) -> None:
    """Shows what training a project would be, without training it."""
    if check and probe_memory:
        raise typer.BadParameter("memory is probed on the longest planned batch, which --check does not plan")
    level = plan_pb2.PLAN_LEVEL_CHECK if check else plan_pb2.PLAN_LEVEL_EXACT
    found = find_project(session.client, project)
    answer = session.client.jobs.plan(found.project_id, level=level, probe_memory=probe_memory)
    if session.out.is_json:
        session.out.message(answer, ())
    else:
        show_plan(session.out, answer.plan, answer.node, dataset_names=dataset_names(session.client, found))


def start(
    session: Session,
    project: ProjectArgument,
    priority: Annotated[int, typer.Option("--priority", help="Higher goes first.")] = 0,
    max_retries: Annotated[int | None, typer.Option("--max-retries", min=0, help="Automatic retries.")] = None,
    from_job: Annotated[str, typer.Option("--from-job", help="Begin with what this job trained.")] = "",
    from_checkpoint: Annotated[
        str, typer.Option("--from-checkpoint", help="Begin with this checkpoint of --from-job.")
    ] = "",
    request_id: Annotated[str, typer.Option("--request-id", help="The same id gives the same job.")] = "",
    follow: Annotated[bool, typer.Option("--watch", "-w", help="Watch it until it is over.")] = False,
) -> None:
    """Starts training a project."""
    project_id = find_project(session.client, project).project_id
    job = session.client.jobs.start(
        project_id,
        priority=priority,
        max_retries=max_retries,
        from_job_id=from_job,
        from_checkpoint=from_checkpoint,
        request_id=request_id,
    )
    show_started(session, job, follow=follow)


def watch(
    session: Session,
    job: JobArgument,
    after: Annotated[int, typer.Option("--after", min=0, help="Only events after this sequence.")] = 0,
) -> None:
    """Follows a job until it is over. Exit status 0 only if it SUCCEEDED."""
    # A service that is not there is said at once; a watch under way waits for it to come back.
    session.client.jobs.get(job)
    _watch(session, job, after)


def logs(
    session: Session,
    job: JobArgument,
    after: Annotated[int, typer.Option("--after", min=0, help="Only events after this sequence.")] = 0,
    everything: Annotated[bool, typer.Option("--all", help="Every event, not only log lines and warnings.")] = False,
) -> None:
    """Prints what a job has logged so far; does not wait for more."""
    kinds = (event_pb2.EVENT_KIND_LOG, event_pb2.EVENT_KIND_WARNING, event_pb2.EVENT_KIND_JOB_STATE)
    for event in session.client.jobs.events(job, after_sequence=after):
        if not everything and event.kind not in kinds:
            continue
        if session.out.is_json:
            session.out.json_line(event)
        elif line := describe(event):
            time = event.time.ToDatetime().strftime("%Y-%m-%d %H:%M:%S")
            session.out.line(f"{event.sequence:>6}  {time}  {line}")


def show_started(session: Session, job: job_service_pb2.Job, *, follow: bool) -> None:
    """A job that was just stored: its row, or, with `follow`, all of it until it is over."""
    if follow:
        session.out.remark(f"job {job.job_id}")
        _watch(session, job.job_id, 0)
    else:
        session.out.table(COLUMNS, [row(job)], [job])
        session.out.remark(f"follow it with `tunesmith watch {job.job_id}`")


def _watch(session: Session, job_id: str, after_sequence: int) -> None:
    events = session.client.jobs.watch(job_id, after_sequence=after_sequence)
    last_sequence = after_sequence
    try:
        with follower_for(session.out) as follower, events:
            for event in events:
                follower.show(event)
                last_sequence = event.sequence
    except KeyboardInterrupt:
        session.out.remark(f"the job goes on; `tunesmith watch {job_id} --after {last_sequence}` follows it again")
        raise
    job = session.client.jobs.get(job_id)
    if job.state != event_pb2.JOB_STATE_SUCCEEDED:
        raise typer.Exit(ExitCode.FAILED)


def _job_command(help_text: str, verb: JobVerb) -> Callable[..., None]:
    def run(session: Session, job: JobArgument) -> None:
        answer = verb(session.client, job)
        session.out.table(COLUMNS, [row(answer)], [answer])

    run.__doc__ = help_text
    return run
