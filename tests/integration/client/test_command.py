"""The command line against a real server: exit statuses, formats, filters, lines that are safe to print."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.fakes.scripted_control import FakeControl, refuse
from tunesmith.common.v1 import event_pb2, plan_pb2, training_spec_pb2
from tunesmith.control.v1 import (
    artifact_service_pb2,
    dataset_service_pb2,
    job_service_pb2,
    node_service_pb2,
    project_service_pb2,
)
from tunesmith_cli.main import main

JOB = "01JZZZZZZZZZZZZZZZZZZZZZZZ"


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeControl]:
    with FakeControl() as fake:
        monkeypatch.setenv("TUNESMITH_ADDRESS", fake.address)
        yield fake


def job(state: "event_pb2.JobState.ValueType", **fields: Any) -> job_service_pb2.Job:
    return job_service_pb2.Job(job_id=JOB, project_id=1, project_name="demo", state=state, **fields)


def give_job(control: FakeControl, answer: job_service_pb2.Job) -> None:
    control.handlers["GetJob"] = lambda *_: job_service_pb2.GetJobResponse(job=answer)


def step(number: int) -> event_pb2.Event:
    event = event_pb2.Event(sequence=number, kind=event_pb2.EVENT_KIND_STEP)
    event.payload.step.MergeFrom(event_pb2.StepEvent(step=number, total_steps=3, loss=4.0 - number))
    return event


def test_a_table_off_a_terminal_has_one_line_for_each_row(
    control: FakeControl, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = [
        node_service_pb2.Node(name="local", address="127.0.0.1:1", state=node_service_pb2.NODE_STATE_REACHABLE),
        node_service_pb2.Node(name="far", problem="x" * 300),
    ]
    control.handlers["ListNodes"] = lambda *_: node_service_pb2.ListNodesResponse(nodes=nodes)
    assert main(["nodes", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].split() == ["NAME", "ADDRESS", "STATE", "DEVICES", "RESIDENT", "JOBS", "PROBLEM"]
    assert lines[1].split()[:3] == ["local", "127.0.0.1:1", "REACHABLE"]


def test_json_has_the_contracts_field_names(control: FakeControl, capsys: pytest.CaptureFixture[str]) -> None:
    node = node_service_pb2.Node(name="local", state=node_service_pb2.NODE_STATE_REACHABLE)
    control.handlers["ListNodes"] = lambda *_: node_service_pb2.ListNodesResponse(nodes=[node])
    assert main(["nodes", "list", "--output", "json"]) == 0
    (parsed,) = json.loads(capsys.readouterr().out)
    assert (parsed["name"], parsed["state"], parsed["job_ids"]) == ("local", "NODE_STATE_REACHABLE", [])


def test_a_refusal_is_exit_status_3_and_says_everything(
    control: FakeControl, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_model(request: Any, context: grpc.ServicerContext) -> Any:
        refuse(
            context,
            grpc.StatusCode.FAILED_PRECONDITION,
            "MODEL_NOT_FOUND",
            "no node has it",
            metadata={"available_models": "org/other"},
            violations={"project.base_model": "not there"},
            request_id="r-9",
        )

    project = project_service_pb2.Project(project_id=1)
    control.handlers["GetProject"] = lambda *_: project_service_pb2.GetProjectResponse(project=project)
    control.handlers["StartTraining"] = no_model
    assert main(["start", "1"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    for part in ("MODEL_NOT_FOUND", "no node has it", "org/other", "project.base_model: not there", "r-9"):
        assert part in captured.err


def test_a_refusal_says_nothing_twice_and_not_a_hundred_lines(
    control: FakeControl, capsys: pytest.CaptureFixture[str]
) -> None:
    def malformed(request: Any, context: grpc.ServicerContext) -> Any:
        violations = {f"line {number}": "is not JSON" for number in range(1, 33)}
        message, metadata = "line 1: is not JSON (and 150 more)", {"num_bad_lines": "151"}
        code = grpc.StatusCode.INVALID_ARGUMENT
        refuse(context, code, "DATASET_MALFORMED", message, metadata=metadata, violations=violations)

    control.handlers["GetDataset"] = malformed
    assert main(["datasets", "preview", "1"]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: DATASET_MALFORMED: line 1: is not JSON (and 150 more)"
    assert lines[1] == "  line 2: is not JSON"
    assert lines[11:] == ["  and 21 more", "  num_bad_lines: 151"]


def test_a_wrong_name_is_answered_with_those_that_are_there(
    control: FakeControl, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"rows-{number}" for number in range(25)]
    datasets = [dataset_service_pb2.Dataset(dataset_id=number + 1, name=name) for number, name in enumerate(names)]
    control.handlers["ListDatasets"] = lambda *_: dataset_service_pb2.ListDatasetsResponse(datasets=datasets)
    control.handlers["ListProjects"] = lambda *_: project_service_pb2.ListProjectsResponse()
    assert main(["datasets", "preview", "rowz"]) == 3
    assert main(["plan", "demo"]) == 3
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"error: DATASET_NOT_FOUND: no dataset is named 'rowz'; there are {', '.join(names[:20])}, ..."
    assert second == "error: PROJECT_NOT_FOUND: no project is named 'demo'; there are none"


def test_nobody_there_is_exit_status_4_and_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeControl() as gone:
        address = gone.address
    assert main(["jobs", "list", "--address", address]) == 4
    assert "--address or TUNESMITH_ADDRESS" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["jobs", "list", "--state", "sleeping"],
        ["no-such-command"],
        ["jobs", "show"],
        ["jobs", "list", "--output", "xml"],
    ],
)
def test_wrong_usage_is_exit_status_2(arguments: list[str], control: FakeControl) -> None:
    assert main(arguments) == 2
    assert control.requests == {}


def test_ctrl_c_is_exit_status_130(control: FakeControl, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tunesmith_client._nouns.Nodes.list", interrupted)
    assert main(["nodes", "list"]) == 130


@pytest.mark.parametrize(
    ("state", "status"),
    [(event_pb2.JOB_STATE_SUCCEEDED, 0), (event_pb2.JOB_STATE_FAILED, 1), (event_pb2.JOB_STATE_CANCELLED, 1)],
)
def test_a_watch_ends_with_the_jobs_own_outcome(
    state: "event_pb2.JobState.ValueType", status: int, control: FakeControl, capsys: pytest.CaptureFixture[str]
) -> None:
    events = [step(1), step(2), step(3)]
    control.handlers["WatchJob"] = lambda *_: iter([job_service_pb2.WatchJobResponse(events=events)])
    give_job(control, job(state))
    assert main(["watch", JOB]) == status
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]


def test_a_watch_as_json_is_one_event_a_line(control: FakeControl, capsys: pytest.CaptureFixture[str]) -> None:
    control.handlers["WatchJob"] = lambda *_: iter([job_service_pb2.WatchJobResponse(events=[step(1), step(2)])])
    give_job(control, job(event_pb2.JOB_STATE_SUCCEEDED))
    assert main(["watch", JOB, "-o", "json"]) == 0
    parsed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["payload"]["step"]["step"] for event in parsed] == ["1", "2"]


def test_what_a_server_sends_cannot_drive_the_terminal(
    control: FakeControl, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = job(event_pb2.JOB_STATE_QUEUED, wait_message="\x1b[2Jwaits\nfor nothing")
    control.handlers["ListJobs"] = lambda *_: job_service_pb2.ListJobsResponse(jobs=[answer])
    assert main(["jobs", "list"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\\x1b[2Jwaits\\x0afor nothing" in out


def test_list_filters_reach_the_service(control: FakeControl) -> None:
    project = project_service_pb2.Project(project_id=7, name="demo")
    other = project_service_pb2.Project(project_id=8, name="demo-2")
    control.handlers["ListProjects"] = lambda *_: project_service_pb2.ListProjectsResponse(projects=[other, project])
    control.handlers["ListJobs"] = lambda *_: job_service_pb2.ListJobsResponse()
    assert main(["jobs", "list", "--project", "demo", "--state", "running", "--state", "QUEUED"]) == 0
    (request,) = control.calls("ListJobs")
    assert request.project_id == 7
    assert list(request.states) == [event_pb2.JOB_STATE_RUNNING, event_pb2.JOB_STATE_QUEUED]


def test_a_project_file_becomes_a_project(control: FakeControl, tmp_path: Path) -> None:
    file = tmp_path / "project.yaml"
    file.write_text("name: demo\ntraits: [{trait_type: a, datasets: [{dataset: rows, percentage: 100}]}]\n")
    dataset = dataset_service_pb2.Dataset(dataset_id=12, name="rows")
    control.handlers["ListDatasets"] = lambda *_: dataset_service_pb2.ListDatasetsResponse(datasets=[dataset])
    control.handlers["CreateProject"] = lambda request, _: project_service_pb2.CreateProjectResponse(
        project=request.project
    )
    assert main(["projects", "create", "-f", str(file)]) == 0
    (request,) = control.calls("CreateProject")
    assert request.project.traits[0].datasets[0].dataset_id == 12


def test_a_wrong_project_file_sends_nothing(
    control: FakeControl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "project.yaml"
    file.write_text("name: demo\nbase: x\n")
    assert main(["projects", "create", "-f", str(file)]) == 2
    assert "project.yaml:2: unknown key `base`" in capsys.readouterr().err
    assert control.requests == {}


@pytest.mark.parametrize(
    ("verb", "method"),
    [("cancel", "CancelJob"), ("pause", "PauseJob"), ("resume", "ResumeJob"), ("retry", "RetryJob")],
)
def test_the_verbs_call_their_methods(verb: str, method: str, control: FakeControl) -> None:
    response = getattr(job_service_pb2, f"{method}Response")
    control.handlers[method] = lambda *_: response(job=job(event_pb2.JOB_STATE_QUEUED))
    assert main([verb, JOB]) == 0
    (request,) = control.calls(method)
    assert request.job_id == JOB
    assert request.request_id


def test_an_interrupted_watch_says_that_the_job_goes_on(
    control: FakeControl, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: object, event: event_pb2.Event) -> None:
        if event.sequence == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("tunesmith_cli.follow.LineFollower.show", interrupted)
    control.handlers["WatchJob"] = lambda *_: iter([job_service_pb2.WatchJobResponse(events=[step(1), step(2)])])
    give_job(control, job(event_pb2.JOB_STATE_RUNNING))
    assert main(["watch", JOB]) == 130
    assert f"the job goes on; `tunesmith watch {JOB} --after 1` follows it again" in capsys.readouterr().err
    assert control.calls("CancelJob") == []


def test_a_plan_that_counted_no_tokens_shows_none(control: FakeControl, capsys: pytest.CaptureFixture[str]) -> None:
    trait = training_spec_pb2.Trait(
        trait_type="a", datasets=[training_spec_pb2.TraitDataset(dataset_id=12, percentage=100)]
    )
    project = project_service_pb2.Project(project_id=1, name="demo", traits=[trait])
    control.handlers["GetProject"] = lambda *_: project_service_pb2.GetProjectResponse(project=project)
    dataset = dataset_service_pb2.Dataset(dataset_id=12, name="rows")
    control.handlers["GetDataset"] = lambda *_: dataset_service_pb2.GetDatasetResponse(dataset=dataset)
    source = plan_pb2.DatasetPlan(trait_type="a", dataset_id=12, share=1, num_available=30)
    plan = plan_pb2.Plan(datasets=[source])

    def answer(request: job_service_pb2.PlanTrainingRequest, _: object) -> job_service_pb2.PlanTrainingResponse:
        plan.level = request.level
        plan.total_tokens = 12345 if request.level == plan_pb2.PLAN_LEVEL_EXACT else 0
        return job_service_pb2.PlanTrainingResponse(plan=plan)

    control.handlers["PlanTraining"] = answer
    assert main(["plan", "1", "--check"]) == 0
    checked = capsys.readouterr().out
    assert checked.splitlines()[2].split() == ["a", "rows", "100.0", "%", "30", "0", "-", "-", "-", "-"]
    assert "tokens       not counted" in checked
    assert main(["plan", "1"]) == 0
    assert "tokens       12,345 in all steps" in capsys.readouterr().out


def test_a_project_is_shown_with_what_it_sets(control: FakeControl, capsys: pytest.CaptureFixture[str]) -> None:
    trait = training_spec_pb2.Trait(
        trait_type="a",
        datasets=[training_spec_pb2.TraitDataset(dataset_id=12, percentage=100)],
        held_out_dataset_ids=[13],
    )
    project = project_service_pb2.Project(project_id=1, name="demo", traits=[trait])
    project.hyperparameters.lora.rank = 8
    project.sample_prompts.add(trait_type="a", prompt="one\ntwo")
    control.handlers["GetProject"] = lambda *_: project_service_pb2.GetProjectResponse(project=project)
    control.handlers["GetDataset"] = lambda request, _: dataset_service_pb2.GetDatasetResponse(
        dataset=dataset_service_pb2.Dataset(dataset_id=request.dataset_id, name=f"rows-{request.dataset_id}")
    )
    assert main(["projects", "show", "1"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["hyperparameters.lora.rank", "8"] in lines
    assert ["a", "1", "rows-12", "100"] in lines
    assert ["a", "1", "rows-13", "held", "out"] in lines
    assert lines[-2:] == [["one"], ["two"]]


def test_the_version_and_the_doctor_are_for_scripts_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tunesmith ")
    status = main(["doctor", "--output", "json"])
    report = json.loads(capsys.readouterr().out)
    assert status == (0 if report["ok"] else 1)
    assert {"tunesmith", "grpcio", "protobuf", "python"} <= set(report["versions"])


def test_no_color_is_honored(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    monkeypatch.setenv("NO_COLOR", "1")
    assert Console(force_terminal=True).no_color


def test_a_dataset_is_shown_with_its_tokens_and_previewed_with_what_carries_loss(
    control: FakeControl, capsys: pytest.CaptureFixture[str]
) -> None:
    def dataset(request: Any, context: grpc.ServicerContext) -> Any:
        found = dataset_service_pb2.Dataset(dataset_id=1, name="rows", format="text", file_format="csv", num_examples=2)
        if request.base_model:
            found.statistics.tokens.base_model = request.base_model
            found.statistics.tokens.num_tokens = 12
        return dataset_service_pb2.GetDatasetResponse(dataset=found)

    def preview(request: Any, context: grpc.ServicerContext) -> Any:
        row = dataset_service_pb2.DatasetRow(line=1, json='{"text": "a"}')
        if request.base_model:
            row.rendered.segments.add(text="q ", num_tokens=1)
            row.rendered.segments.add(text=f"{request.loss_on} {request.max_length}", is_target=True, num_tokens=2)
        return dataset_service_pb2.PreviewDatasetResponse(rows=[row])

    control.handlers |= {"GetDataset": dataset, "PreviewDataset": preview}
    assert main(["datasets", "show", "1"]) == 0
    assert "tokens" not in capsys.readouterr().out
    assert main(["datasets", "show", "1", "--base-model", "org/tiny"]) == 0
    assert "12, of which 0 carry loss" in capsys.readouterr().out
    assert main(["datasets", "preview", "1"]) == 0
    assert '{"text": "a"}' in capsys.readouterr().out
    options = ["--base-model", "org/tiny", "--loss-on", "all", "--max-length", "9"]
    assert main(["datasets", "preview", "1", *options]) == 0
    captured = capsys.readouterr()
    assert "q [[all 9]]" in captured.out
    assert "between [[ and ]]" in captured.err
    assert main(["datasets", "preview", "1", *options, "--output", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["rendered"]["segments"][1] == {"text": "all 9", "is_target": True, "num_tokens": 2}


def test_starting_from_an_earlier_job_names_it(control: FakeControl, capsys: pytest.CaptureFixture[str]) -> None:
    project = project_service_pb2.Project(project_id=1)
    control.handlers["GetProject"] = lambda *_: project_service_pb2.GetProjectResponse(project=project)
    queued = job_service_pb2.StartTrainingResponse(job=job(event_pb2.JOB_STATE_QUEUED))
    control.handlers["StartTraining"] = lambda *_: queued
    assert main(["start", "1", "--from-job", JOB, "--from-checkpoint", "step-00000020"]) == 0
    (request,) = control.requests["StartTraining"]
    assert (request.start_from_job_id, request.start_from_checkpoint) == (JOB, "step-00000020")


def test_an_export_is_queued_and_can_be_waited_for(control: FakeControl, capsys: pytest.CaptureFixture[str]) -> None:
    queued = artifact_service_pb2.ExportArtifactResponse(job=job(event_pb2.JOB_STATE_QUEUED))
    control.handlers["ExportArtifact"] = lambda *_: queued
    assert main(["artifacts", "export", "--job", JOB, "--format", "merged", "--max-logit-difference", "0.5"]) == 0
    (request,) = control.requests["ExportArtifact"]
    assert (request.job_id, request.format, request.max_logit_difference) == (JOB, "merged", 0.5)
    assert JOB in capsys.readouterr().out

    give_job(control, job(event_pb2.JOB_STATE_FAILED))
    control.handlers["WatchJob"] = lambda *_: iter(())
    assert main(["artifacts", "export", "--job", JOB, "--wait"]) != 0


def test_an_export_that_is_not_offered_says_why(control: FakeControl, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(request: Any, context: grpc.ServicerContext) -> Any:
        refuse(context, grpc.StatusCode.FAILED_PRECONDITION, "NOT_OFFERED", "export 'gguf' is not offered: no package")

    control.handlers["ExportArtifact"] = refused
    assert main(["artifacts", "export", "--job", JOB, "--format", "gguf"]) == 3
    assert "NOT_OFFERED" in capsys.readouterr().err
