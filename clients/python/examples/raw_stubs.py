"""Talks to the control service with nothing but grpcio and the generated stubs: models, projects, jobs, and one log.

usage: raw_stubs.py [ADDRESS]
"""

import sys

import grpc

from tunesmith.common.v1 import event_pb2
from tunesmith.control.v1 import (
    job_service_pb2,
    job_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    project_service_pb2,
    project_service_pb2_grpc,
)


def main(address: str = "127.0.0.1:50051") -> None:
    """Prints what is there."""
    with grpc.insecure_channel(address) as channel:
        models = model_service_pb2_grpc.ModelServiceStub(channel)
        for model in models.ListModels(model_service_pb2.ListModelsRequest(), timeout=15).models:
            print(f"model {model.name}: {model.num_parameters} parameters")

        projects = project_service_pb2_grpc.ProjectServiceStub(channel)
        for project in projects.ListProjects(project_service_pb2.ListProjectsRequest(), timeout=15).projects:
            print(f"project {project.project_id}: {project.name}")

        jobs = job_service_pb2_grpc.JobServiceStub(channel)
        listed = jobs.ListJobs(job_service_pb2.ListJobsRequest(), timeout=15).jobs
        for job in listed:
            print(f"job {job.job_id}: {event_pb2.JobState.Name(job.state)}")
        if listed:
            # Without the client's facade, resuming after a lost connection is the caller's: keep the last sequence.
            request = job_service_pb2.WatchJobRequest(job_id=listed[0].job_id, after_sequence=0)
            for response in jobs.WatchJob(request, timeout=60):
                for event in response.events:
                    print(f"event {event.sequence}: {event_pb2.EventKind.Name(event.kind)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
