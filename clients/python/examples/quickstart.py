"""Trains a small adapter on one dataset and downloads it: upload, project, plan, start, wait, download.

usage: quickstart.py DATASET.jsonl [ADDRESS] [BASE_MODEL]
"""

import sys
import uuid
from pathlib import Path

from tunesmith.common.v1 import event_pb2
from tunesmith.common.v1 import training_spec_pb2 as spec
from tunesmith.control.v1 import project_service_pb2 as projects
from tunesmith_client import Client


def show(event: event_pb2.Event) -> None:
    """Prints each step's loss."""
    if event.kind == event_pb2.EVENT_KIND_STEP:
        step = event.payload.step
        print(f"step {step.step} of {step.total_steps}: loss {step.loss:.4f}")


def main(dataset_file: str, address: str = "127.0.0.1:50051", base_model: str = "") -> None:
    """Runs the whole path once."""
    name = Path(dataset_file).stem
    with Client(address) as client:
        dataset = client.datasets.upload(dataset_file, name=name)
        project = client.projects.create(
            projects.Project(
                name=f"quickstart-{uuid.uuid4().hex[:8]}",
                base_model=base_model or "HuggingFaceTB/SmolLM2-135M-Instruct",
                model_type="llama",
                training_type="qlora",
                output_directory="quickstart",
                traits=[
                    spec.Trait(
                        trait_type=name,
                        datasets=[spec.TraitDataset(dataset_id=dataset.dataset_id, percentage=100)],
                    )
                ],
                hyperparameters=spec.Hyperparameters(num_steps=4, batch=spec.Batch(examples=2)),
            )
        )
        plan = client.jobs.plan(project.project_id).plan
        print(f"{plan.num_steps} steps over {plan.total_tokens} tokens")
        job = client.jobs.start(project.project_id)
        client.jobs.wait(job.job_id, on_event=show)
        for path in client.artifacts.download(job.job_id, "adapter", Path("adapter") / job.job_id):
            print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
