"""Requests against their declared constraints: one table of bad values and the paths that must be named."""

from __future__ import annotations

import random
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from control_service.api.validation import _check_message, _is_legal, check
from tunesmith.common.v1 import training_spec_pb2 as spec
from tunesmith.control.v1 import dataset_service_pb2 as datasets
from tunesmith.control.v1 import job_service_pb2 as jobs
from tunesmith.control.v1 import node_service_pb2 as nodes
from tunesmith.control.v1 import project_service_pb2 as projects

NAN, INFINITY = float("nan"), float("inf")


def _project(**fields: Any) -> projects.CreateProjectRequest:
    values: dict[str, Any] = {
        "name": "My project 1",
        "base_model": "org/name",
        "model_type": "code_llama",
        "training_type": "qlora",
        "output_directory": "./output/test",
        "traits": [spec.Trait(trait_type="reasoning", datasets=[spec.TraitDataset(dataset_id=1, percentage=100)])],
        **fields,
    }
    return projects.CreateProjectRequest(project=projects.Project(**values))


def _tuned(**fields: Any) -> projects.CreateProjectRequest:
    return _project(hyperparameters=spec.Hyperparameters(**fields))


def _trait(**fields: Any) -> projects.CreateProjectRequest:
    values: dict[str, Any] = {"trait_type": "t", "datasets": [spec.TraitDataset(dataset_id=1, percentage=100)]}
    return _project(traits=[spec.Trait(**{**values, **fields})])


def _numbers(*numbers: int) -> Any:
    """Enum numbers that may not be of the contract."""
    return list(numbers)


GOOD = {
    "plain": _project(),
    "output-only fields are not looked at": _project(project_id=-5, etag="abc"),
    "weight of zero": _trait(weight=0),
    "text with lines": _project(sample_prompts=[spec.SamplePrompt(prompt="a\n\tb")]),
    "unicode text": _project(sample_prompts=[spec.SamplePrompt(prompt="Grüße, 世界")]),
    "bounds": _tuned(lora=spec.Lora(rank=1024, dropout=0.9), seed=0, num_steps=1),
    "unset optional": _tuned(),
    "negative priority": jobs.StartTrainingRequest(project_id=1, priority=-1000),
    "mask leaves out what is missing": projects.UpdateProjectRequest(
        project=projects.Project(project_id=1, hyperparameters=spec.Hyperparameters(seed=1)),
        update_mask=FieldMask(paths=["hyperparameters"]),
    ),
    "a whole chunk": datasets.UploadDatasetRequest(chunk=b"x" * 2**20),
    "ipv6 address": nodes.RegisterNodeRequest(name="gpu-0", address="[::1]:50052"),
}

BAD = {
    "nothing": (projects.CreateProjectRequest(), "project"),
    "no name": (_project(name=""), "project.name"),
    "name with a line feed": (_project(name="a\n"), "project.name"),
    "name with an escape": (_project(name="a\x1b[2J"), "project.name"),
    "long name": (_project(name="a" * 129), "project.name"),
    "model without an organization": (_project(base_model="name"), "project.base_model"),
    "model with a parent": (_project(base_model="../name"), "project.base_model"),
    "model with two slashes": (_project(base_model="a/b/c"), "project.base_model"),
    "output with NUL": (_project(output_directory="a\0b"), "project.output_directory"),
    "output with a direction override": (_project(output_directory="a\u202eb"), "project.output_directory"),
    "long output": (_project(output_directory="a" * 5000), "project.output_directory"),
    "no traits": (_project(traits=[]), "project.traits"),
    "too many traits": (_project(traits=[spec.Trait()] * 65), "project.traits"),
    "trait without datasets": (_trait(datasets=[]), "project.traits[0].datasets"),
    "negative weight": (_trait(weight=-1), "project.traits[0].weight"),
    "NaN weight": (_trait(weight=NAN), "project.traits[0].weight"),
    "infinite weight": (_trait(weight=INFINITY), "project.traits[0].weight"),
    "percentage above 100": (
        _trait(datasets=[spec.TraitDataset(dataset_id=1, percentage=100.1)]),
        "project.traits[0].datasets[0].percentage",
    ),
    "NaN percentage": (
        _trait(datasets=[spec.TraitDataset(dataset_id=1), spec.TraitDataset(dataset_id=1, percentage=NAN)]),
        "project.traits[0].datasets[1].percentage",
    ),
    "dataset id of zero": (_trait(datasets=[spec.TraitDataset()]), "project.traits[0].datasets[0].dataset_id"),
    "negative dataset id": (
        _trait(datasets=[spec.TraitDataset(dataset_id=-1)]),
        "project.traits[0].datasets[0].dataset_id",
    ),
    "negative held-out id": (_trait(held_out_dataset_ids=[1, -1]), "project.traits[0].held_out_dataset_ids[1]"),
    "rank of 10^9": (_tuned(lora=spec.Lora(rank=10**9)), "project.hyperparameters.lora.rank"),
    "rank of zero, set": (_tuned(lora=spec.Lora(rank=0)), "project.hyperparameters.lora.rank"),
    "alpha of zero": (_tuned(lora=spec.Lora(alpha=0)), "project.hyperparameters.lora.alpha"),
    "pattern as a target": (
        _tuned(lora=spec.Lora(target_modules=["q_proj", "(a+)+$"])),
        "project.hyperparameters.lora.target_modules[1]",
    ),
    "empty target": (
        _tuned(lora=spec.Lora(target_modules=[""])),
        "project.hyperparameters.lora.target_modules[0]",
    ),
    "infinite learning rate": (
        _tuned(optimizer=spec.Optimizer(learning_rate=INFINITY)),
        "project.hyperparameters.optimizer.learning_rate",
    ),
    "batch of nothing": (_tuned(batch=spec.Batch(examples=0)), "project.hyperparameters.batch.examples"),
    "negative steps": (_tuned(num_steps=-1), "project.hyperparameters.num_steps"),
    "no epochs": (_tuned(num_epochs=0), "project.hyperparameters.num_epochs"),
    "negative seed": (_tuned(seed=-1), "project.hyperparameters.seed"),
    "unknown schedule": (
        _tuned(schedule=spec.Schedule(name="zigzag")),
        "project.hyperparameters.schedule.name",
    ),
    "mix of nothing": (_project(mix=spec.Mix(total=0)), "project.mix.total"),
    "long prompt": (
        _project(sample_prompts=[spec.SamplePrompt(prompt="x" * 8193)]),
        "project.sample_prompts[0].prompt",
    ),
    "prompt with NUL": (_project(sample_prompts=[spec.SamplePrompt(prompt="\0")]), "project.sample_prompts[0].prompt"),
    "long request id": (jobs.CancelJobRequest(job_id="x", request_id="r" * 65), "request_id"),
    "no job id": (jobs.CancelJobRequest(), "job_id"),
    "page size below zero": (jobs.ListJobsRequest(page_size=-1), "page_size"),
    "page size above the most": (jobs.ListJobsRequest(page_size=1001), "page_size"),
    "long page token": (jobs.ListJobsRequest(page_token="t" * 4097), "page_token"),
    "unknown state": (jobs.ListJobsRequest(states=_numbers(1, 99)), "states[1]"),
    "unspecified state": (jobs.ListJobsRequest(states=_numbers(0)), "states[0]"),
    "unknown plan level": (jobs.PlanTrainingRequest(project_id=1, level=_numbers(7)[0]), "level"),
    "large chunk": (datasets.UploadDatasetRequest(chunk=b"x" * (2**20 + 1)), "chunk"),
    "upper-case digest": (
        datasets.UploadDatasetRequest(header=datasets.UploadDatasetHeader(name="a", sha256="A" * 64)),
        "header.sha256",
    ),
    "mask with an unknown path": (
        projects.UpdateProjectRequest(project=projects.Project(), update_mask=FieldMask(paths=["nmae"])),
        "update_mask.paths[0]",
    ),
    "masked field that is bad": (
        projects.UpdateProjectRequest(
            project=projects.Project(hyperparameters=spec.Hyperparameters(seed=-1)),
            update_mask=FieldMask(paths=["hyperparameters"]),
        ),
        "project.hyperparameters.seed",
    ),
    "address without a port": (nodes.RegisterNodeRequest(name="a", address="host"), "address"),
    "node name with a dot": (nodes.RegisterNodeRequest(name="a.b", address="host:1"), "name"),
}


@pytest.mark.parametrize("case", GOOD)
def test_a_legal_request_has_no_violation(case: str) -> None:
    assert check(GOOD[case]) == ()


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_is_named_by_its_path(case: str) -> None:
    request, path = BAD[case]
    violations = check(request)
    assert [violation.field for violation in violations] == [path]
    assert violations[0].description


def test_all_violations_are_collected_in_field_order() -> None:
    request = _project(name="", base_model="x", traits=[])
    assert [violation.field for violation in check(request)] == ["project.name", "project.base_model", "project.traits"]


def _filled(message: Any, numbers: random.Random, *, depth: int = 0) -> Any:
    """A message with some of its fields, in values of which many are bad."""
    for field in message.DESCRIPTOR.fields:
        if numbers.random() < 0.5 or depth > 4:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            if field.message_type.fields_by_name["value"].message_type is None:
                getattr(message, field.name)[numbers.choice(("k", "k\n"))] = _leaf(
                    field.message_type.fields_by_name["value"], numbers
                )
        elif field.message_type is not None and field.is_repeated:
            for _ in range(numbers.randrange(3)):
                _filled(getattr(message, field.name).add(), numbers, depth=depth + 1)
        elif field.message_type is not None:
            getattr(message, field.name).SetInParent()
            _filled(getattr(message, field.name), numbers, depth=depth + 1)
        elif field.is_repeated:
            getattr(message, field.name).extend(_leaf(field, numbers) for _ in range(numbers.randrange(3)))
        else:
            setattr(message, field.name, _leaf(field, numbers))
    return message


def _leaf(field: Any, numbers: random.Random) -> Any:
    if field.cpp_type == field.CPPTYPE_STRING:
        text = numbers.choice(("", "org/name", "nf4", "a b", "a\x00", "x" * 5000))
        return text.encode() if field.type == field.TYPE_BYTES else text
    if field.cpp_type in (field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT):
        return numbers.choice((0.0, 0.5, 1.0, 100.0, -1.0, NAN, INFINITY))
    if field.cpp_type == field.CPPTYPE_BOOL:
        return numbers.random() < 0.5
    return numbers.choice((0, 1, 2, 100))


@pytest.mark.parametrize("package", [datasets, jobs, nodes, projects], ids=lambda module: module.DESCRIPTOR.name)
def test_the_first_look_passes_what_the_second_one_finds_nothing_in(package: Any) -> None:
    numbers, found = random.Random(5), {True: 0, False: 0}
    for name, descriptor in package.DESCRIPTOR.message_types_by_name.items():
        if not name.endswith("Request"):
            continue
        for _ in range(60):
            request = _filled(getattr(package, descriptor.name)(), numbers)
            is_legal = not tuple(_check_message(request, "", frozenset()))
            assert _is_legal(request) == is_legal, request
            found[is_legal] += 1
    assert min(found.values()) > 10, found


@pytest.mark.parametrize("case", [case for case in GOOD if "mask" not in case])
def test_a_legal_request_needs_no_second_look(case: str) -> None:
    assert _is_legal(GOOD[case])
