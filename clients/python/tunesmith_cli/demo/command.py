"""The demo's order of steps. Each step is in a file of its own; this one only strings them together.

Exit status 0 only when the held-out loss of every trait fell. Both services are stopped at the end, always.
"""

from pathlib import Path
from typing import Annotated

import typer

from tunesmith_cli.demo.examples import DEFAULT_EXAMPLES, Example, read_example
from tunesmith_cli.demo.model import obtain_model
from tunesmith_cli.demo.result import DemoResult, fetch_artifacts, report
from tunesmith_cli.demo.setting import store_project, upload_datasets, wait_for_node
from tunesmith_cli.exit_codes import ExitCode
from tunesmith_cli.follow import follower_for
from tunesmith_cli.output import Format, Output
from tunesmith_cli.plan_table import show_plan
from tunesmith_cli.services import Pair, PairConfig, interrupt_on_sigterm
from tunesmith_client import Client


def demo(
    directory: Annotated[Path, typer.Option("--directory", help="Everything that the demo keeps.")] = Path("data/demo"),
    models: Annotated[Path, typer.Option("--models", help="Where base models are kept.")] = Path("data/models"),
    examples: Annotated[
        Path, typer.Option("--examples", help="Directory of demo_project.yaml and data/.", show_default=False)
    ] = DEFAULT_EXAMPLES,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Optimizer steps, instead of the project file's.")
    ] = None,
) -> None:
    """Fine-tunes a small real model by QLoRA and shows what it learned."""
    out = Output(Format.TABLE)
    example = read_example(examples)
    obtain_model(out, example.base_model, models)
    directory.mkdir(parents=True, exist_ok=True)
    log_path = directory / "services.log"
    with log_path.open("a", encoding="utf-8") as log, interrupt_on_sigterm():

        def sink(name: str, line: str) -> None:
            log.write(f"{name} | {line}\n")
            log.flush()

        config = PairConfig(
            data_directory=directory,
            models_directory=models,
            control_address="127.0.0.1:0",
            gpu_address="127.0.0.1:0",
        )
        out.remark(f"starting both services; their logs go to {log_path}")
        # Ctrl-C stays a KeyboardInterrupt here: it ends the step that is under way; the pair is stopped on the way out.
        with Pair(config, sink=sink) as pair, Client(pair.address) as client:
            out.remark(f"control at {pair.address}, GPU service at {pair.gpu_address}")
            try:
                result = _train(out, client, example, steps)
            except KeyboardInterrupt:
                out.remark("interrupted; stopping both services (again to stop at once)")
                raise
            files = fetch_artifacts(out, client, result.job_id, directory / "output" / result.job_id)
    fell = report(out, result, files)
    raise typer.Exit(ExitCode.OK if fell else ExitCode.FAILED)


def _train(out: Output, client: Client, example: Example, steps: int | None) -> DemoResult:
    wait_for_node(out, client, example.base_model)
    dataset_ids = upload_datasets(out, client, example)
    project = store_project(client, example, dataset_ids, steps)
    out.remark(f"project {project.project_id} ({project.name}); planning")
    answer = client.jobs.plan(project.project_id)
    show_plan(out, answer.plan, answer.node, dataset_names={number: name for name, number in dataset_ids.items()})
    job = client.jobs.start(project.project_id)
    out.remark(f"job {job.job_id}")
    result = DemoResult(job_id=job.job_id)
    with follower_for(out) as follower, client.jobs.watch(job.job_id) as events:
        for event in events:
            result.add(event)
            follower.show(event)
    # Raises JobFailed with the job's own reason.
    client.jobs.wait(job.job_id)
    return result
