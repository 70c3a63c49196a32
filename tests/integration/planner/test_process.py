"""The planner as the process that engine and server exec: real blobs in, exact counts and stable digests out."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from gpu_service.doctor import installed_version
from gpu_service.domain.planned_data import PlannedData
from gpu_service.domain.quantizer import OWN, TESTED_VERSIONS
from tests.fakes.datasets import make_spec, write_blob
from tests.fakes.tiny_models import TinyOptions, place_header_only
from tunesmith.common.v1 import errors_pb2, plan_pb2

ROOT = Path(__file__).parents[3]
TIMEOUT_SECONDS = 100


class Node:
    """The directories that a node gives its planner."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.models = root / "models"
        self.blobs = root / "blobs"
        place_header_only(self.models)

    def start(self, spec: dict[str, Any], *, cache: str = "cache", model: str = "tiny/llama", **request: Any) -> Any:
        value = {
            "spec": spec,
            "model_directory": str(self.models / model),
            "blobs_directory": str(self.blobs),
            "cache_directory": str(self.root / cache),
            "device": {"type": "cpu", "name": "cpu", "total_memory_bytes": 0, "free_memory_bytes": 0},
            **request,
        }
        path = self.root / f"request-{len(list(self.root.glob('request-*')))}.json"
        path.write_text(json.dumps(value), encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'clients/python'}"}
        command = [sys.executable, "-m", "gpu_service.planner", str(path)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    def run(self, spec: dict[str, Any], **request: Any) -> tuple[int, list[dict[str, Any]]]:
        return finish(self.start(spec, **request))

    def plan(self, spec: dict[str, Any], **request: Any) -> PlannedData:
        status, lines = self.run(spec, **request)
        assert status == 0, lines
        return PlannedData.open(lines[-1]["plan_directory"])

    def refuse(self, spec: dict[str, Any], **request: Any) -> dict[str, Any]:
        status, lines = self.run(spec, **request)
        assert status == 3, lines
        failure: dict[str, Any] = lines[-1]["failure"]
        wire = {**failure, "reason": f"ERROR_REASON_{failure['reason']}", "fault": f"FAULT_{failure['fault']}"}
        json_format.ParseDict(wire, errors_pb2.Failure())
        return failure


def finish(process: Any) -> tuple[int, list[dict[str, Any]]]:
    output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    sys.stderr.write(errors)
    return process.returncode, [json.loads(line) for line in output.splitlines()]


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def chat_rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {number} plus two?"},
                {"role": "assistant", "content": f"{number + 2}."},
            ]
        }
        for number in range(first, first + count)
    ]


def pair_rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"def f{number}", "completion": f"return {number}"} for number in range(count)]


def make_references(node: Node) -> list[dict[str, Any]]:
    return [
        write_blob(node.blobs, 1, chat_rows(100), "chat-messages"),
        write_blob(node.blobs, 2, pair_rows(1000), "prompt-completion"),
        write_blob(node.blobs, 3, [{"text": f"text number {number}"} for number in range(300)], "text"),
        write_blob(node.blobs, 4, chat_rows(10, first=500), "chat-messages"),
    ]


def test_the_fast_path_quantizes_by_itself_beside_a_version_that_was_compared(node: Node) -> None:
    """Whoever plans exactly knows the versions too: the run trains by this plan."""
    references = [write_blob(node.blobs, 1, chat_rows(10), "chat-messages")]
    spec = make_spec(references, hyperparameters={"num_epochs": 1, "trainer": "fast"})
    assert installed_version("bitsandbytes") in TESTED_VERSIONS
    assert node.plan(spec).plan["quantizer"] == OWN


def test_exact_counts(node: Node) -> None:
    references = make_references(node)
    spec = make_spec(
        references,
        percentages={1: 60, 2: 30, 3: 10},
        held_out=[4],
        mix={"total": "1000"},
        hyperparameters={"num_epochs": 1.5, "batch": {"examples": 8}},
    )
    data = node.plan(spec, weights_digest="ab" * 32, spec_digest="cd" * 32)
    plan = json_format.ParseDict(dict(data.plan), plan_pb2.Plan())
    assert plan.level == plan_pb2.PLAN_LEVEL_EXACT
    assert [(item.dataset_id, item.num_examples, item.num_available) for item in plan.datasets] == [
        (1, 100, 100),
        (2, 50, 1000),
        (3, 17, 300),
        (4, 10, 10),
    ]
    assert [item.held_out for item in plan.datasets] == [False, False, False, True]
    assert plan.examples_per_epoch == 167
    assert plan.total_examples == 251  # 250.5, rounded up
    assert plan.num_steps == data.num_steps == 32
    assert plan.resolved.schedule.warmup_steps == 1
    assert (plan.weights_digest, plan.spec_digest) == ("ab" * 32, "cd" * 32)
    realized: dict[int, list[int]] = {}
    for step in range(21):  # 168 examples: one epoch and one example more
        for reference in data.step_examples(step):
            realized.setdefault(data.sources[reference.source_index].dataset_id, []).append(reference.example_index)
    assert sum(map(len, realized.values())) == 168
    for item in plan.datasets[:3]:
        used = set(realized[item.dataset_id])
        assert len(used) == item.num_examples
        examples = [data.example((item.dataset_id - 1, index)) for index in used]
        assert item.num_tokens == sum(len(example.tokens) for example in examples)
        assert item.num_target_tokens == sum(sum(example.mask) for example in examples)
    assert plan.tokens_per_epoch == sum(item.num_tokens for item in plan.datasets[:3])


@pytest.mark.parametrize("length", [{"num_steps": "4"}, {"num_steps": "21"}, {"num_epochs": 2.5}])
def test_what_each_dataset_gives_to_the_run_is_what_its_steps_hold(node: Node, length: dict[str, Any]) -> None:
    spec = make_spec(
        make_references(node),
        percentages={1: 60, 2: 30, 3: 10},
        held_out=[4],
        mix={"total": "1000"},
        hyperparameters={"batch": {"examples": 8}, **length},
    )
    data = node.plan(spec)
    plan = json_format.ParseDict(dict(data.plan), plan_pb2.Plan())
    counted = {item.dataset_id: [0, 0, 0] for item in plan.datasets}
    for step in range(data.num_steps):
        for reference in data.step_examples(step):
            example = data.example(reference)
            count = counted[data.sources[reference.source_index].dataset_id]
            count[0] += 1
            count[1] += len(example.tokens)
            count[2] += sum(example.mask)
    planned = {item.dataset_id: [item.run_examples, item.run_tokens, item.run_target_tokens] for item in plan.datasets}
    assert planned == counted
    assert planned[4] == [0, 0, 0]
    totals = [plan.total_examples, plan.total_tokens, plan.total_target_tokens]
    assert [sum(column) for column in zip(*planned.values(), strict=True)] == totals


def test_the_digest_hangs_on_content_alone(node: Node) -> None:
    references = make_references(node)[:3]
    spec = make_spec(references, percentages={1: 60, 2: 30, 3: 10}, hyperparameters={"seed": "5"})
    first = node.plan(spec)
    again = node.plan(spec)
    elsewhere = node.plan(spec, cache="other-cache", device={"type": "cuda", "name": "gpu", "total_memory_bytes": 0})
    turned = json.loads(json.dumps(spec))
    turned["datasets"].reverse()
    turned["traits"][0]["datasets"].reverse()
    reordered = node.plan(turned)
    digest = first.plan["data_digest"]
    assert len(digest) == 64
    assert again.plan == first.plan
    assert elsewhere.plan["data_digest"] == reordered.plan["data_digest"] == digest
    assert [elsewhere.step_examples(step) for step in range(5)] == [first.step_examples(step) for step in range(5)]
    others = [
        {"seed": "6"},
        {"seed": "5", "batch": {"examples": 4}},
        {"seed": "5", "loss_on": "all"},
        {"seed": "5", "num_epochs": 2},
        {"seed": "5", "max_length": 20},
    ]
    digests = {node.plan({**spec, "hyperparameters": other}).plan["data_digest"] for other in others}
    assert len(digests | {digest}) == 6


def test_repeats_cuts_and_drops_are_counted(node: Node) -> None:
    rows = [
        {"prompt": "0 " * 40, "completion": "1"},
        {"prompt": "0", "completion": "1 " * 40},
        {"prompt": "0", "completion": "1"},
    ]
    references = [write_blob(node.blobs, 1, rows, "prompt-completion")]
    spec = make_spec(
        references,
        mix={"policy": "repeat", "max_repeats": 3, "total": "5"},
        hyperparameters={"max_length": 24, "batch": {"examples": 2}},
    )
    data = node.plan(spec)
    [item] = json_format.ParseDict(dict(data.plan), plan_pb2.Plan()).datasets
    assert (item.num_available, item.num_examples, item.num_repeats) == (2, 5, 3)
    assert dict(item.dropped) == {"no_target_tokens": 1}
    assert item.num_truncated in (2, 3)  # the long one of two is seen two or three times
    assert [len(data.step_examples(step)) for step in range(3)] == [2, 2, 1]


def test_preference_pairs_are_planned_as_two_sequences(node: Node) -> None:
    rows = [{"prompt": f"Is {number} even?", "chosen": "Yes it is.", "rejected": "No."} for number in range(40)]
    references = [write_blob(node.blobs, 1, rows, "preference"), write_blob(node.blobs, 2, rows[:5], "preference")]
    spec = make_spec(references, held_out=[2], hyperparameters={"objective": "dpo", "batch": {"examples": 4}})
    data = node.plan(spec)
    examples = [data.example(reference) for step in range(data.num_steps) for reference in data.step_examples(step)]
    assert len(examples) == 40
    assert all(0 < example.rejected_start < len(example.tokens) for example in examples)
    assert all(example.mask[0] == example.mask[example.rejected_start] == 0 for example in examples)
    plan = json_format.ParseDict(dict(data.plan), plan_pb2.Plan())
    assert plan.total_tokens == sum(len(example.tokens) for example in examples)
    # Which answer is preferred is part of what the digest names.
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    other = make_spec(
        [write_blob(node.blobs, 1, turned, "preference"), references[1]],
        held_out=[2],
        hyperparameters=spec["hyperparameters"],
    )
    assert node.plan(other).plan["data_digest"] != plan.data_digest
    assert node.refuse({**spec, "hyperparameters": {}})["reason"] == "COMBINATION_NOT_ALLOWED"


def test_an_inspection_plans_nothing(node: Node) -> None:
    wanted = {
        "dataset": write_blob(node.blobs, 1, chat_rows(300), "chat-messages"),
        "base_model": "tiny/llama",
        "num_rows": 2,
        "count_tokens": True,
    }
    status, lines = node.run({}, inspect=wanted)
    assert status == 0
    assert lines[-1]["type"] == "inspected"
    assert len(lines[-1]["rows"]) == 2
    assert sum(int(bucket["count"]) for bucket in lines[-1]["tokens"]["lengths"]) == 300
    assert [line for line in lines if line["type"] == "progress"][-1]["done"] == 300
    assert not list(node.root.glob("cache/*/*"))
    status, lines = node.run({}, inspect={**wanted, "dataset": {"dataset_id": 1, "sha256": "0" * 64, "format": "text"}})
    assert (status, lines[-1]["failure"]["reason"]) == (3, "BLOB_NOT_FOUND")
    assert node.run({}, inspect={"base_model": "tiny/llama"}) == (2, [])


def test_a_base_without_template(node: Node) -> None:
    model = place_header_only(node.models, TinyOptions(chat_template=False, adds_bos=True))
    chat = [write_blob(node.blobs, 1, chat_rows(10), "chat-messages")]
    failure = node.refuse(make_spec(chat, base_model=model), model=model)
    assert (failure["reason"], failure["details"]["dataset_id"]) == ("CHAT_TEMPLATE_MISSING", "1")
    for template in ("chatml", "plain-turns"):
        spec = make_spec(chat, base_model=model, hyperparameters={"chat_template": template})
        assert node.plan(spec, model=model).num_steps == 2
    pairs = [write_blob(node.blobs, 1, pair_rows(10), "prompt-completion")]
    data = node.plan(make_spec(pairs, base_model=model), model=model)
    example = data.example((0, 0))
    assert example.tokens[0] == example.tokens[-1] == 0  # <|endoftext|> is both beginning and end
    assert example.mask[-1] == 1


@pytest.mark.parametrize(
    ("content", "format", "line"),
    [
        (b'{"text": "a"}\n{"text": "b"', "text", "2"),
        (b'{"text": "a"}\n\n{"text": "\xff"}\n', "text", "3"),
        (b'{"text": "a"}\n{"txt": "b"}\n', "text", "2"),
        (b'{"messages": []}\n', "chat-messages", "1"),
        (b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n", "text", "1"),
    ],
    ids=["cut", "utf-8", "key", "empty", "deep"],
)
def test_bad_rows_are_named(node: Node, content: bytes, format: str, line: str) -> None:
    failure = node.refuse(make_spec([write_blob(node.blobs, 9, content, format)]))
    assert (failure["reason"], failure["fault"]) == ("DATASET_MALFORMED", "USER")
    assert failure["details"] == {"dataset_id": "9", "line": line, "field": "datasets"}
    assert not list((node.root / "cache" / "tokens").glob("*"))


def test_other_refusals(node: Node) -> None:
    references = make_references(node)[:1]
    gone = [{**references[0], "sha256": "0" * 64}]
    assert node.refuse(make_spec(gone))["reason"] == "BLOB_NOT_FOUND"
    short = make_spec(references, hyperparameters={"max_length": 8})
    failure = node.refuse(short)
    assert (failure["reason"], failure["details"]["dataset_id"]) == ("NO_EXAMPLES_LEFT", "1")
    wanting = make_spec(references, mix={"policy": "fail", "total": "101"})
    assert node.refuse(wanting)["reason"] == "MIX_INFEASIBLE"
    small = {"type": "cpu", "name": "cpu", "total_memory_bytes": 1000}
    assert node.refuse(make_spec(references), device=small)["reason"] == "DOES_NOT_FIT"
    assert node.refuse(make_spec(references, hyperparameters={"lora": {"rank": 10**9}}))["reason"] == "INVALID_FIELD"


def test_wrong_calls(node: Node) -> None:
    status, lines = node.run([])  # type: ignore[arg-type]
    assert (status, lines[-1]["failure"]["reason"]) == (3, "INVALID_FIELD")
    status, lines = node.run(make_spec(make_references(node)[:1]), blobs_directory=None)
    assert (status, lines) == (2, [])


def test_a_defect_is_a_typed_failure(node: Node) -> None:
    (node.root / "file").write_bytes(b"")
    failure = node.refuse(make_spec(make_references(node)[:1]), cache_directory=str(node.root / "file"))
    assert (failure["reason"], failure["fault"]) == ("PLANNING", "PLATFORM")
    assert failure["exception_type"] == "builtins.NotADirectoryError"


def test_several_planners_share_a_cache(node: Node) -> None:
    spec = make_spec(make_references(node))
    results = [finish(process) for process in [node.start(spec) for _ in range(4)]]
    assert [status for status, _ in results] == [0] * 4
    assert len({lines[-1]["plan_directory"] for _, lines in results}) == 1
    assert not list((node.root / "cache").glob("*/.staging-*"))
    assert PlannedData.open(results[0][1][-1]["plan_directory"]).num_steps


def test_progress_ends_with_the_total_and_a_second_plan_reads_no_blob(node: Node) -> None:
    references = make_references(node)
    spec = make_spec(references, percentages={1: 0, 2: 50, 3: 50}, held_out=[4])
    _, lines = node.run(spec)
    progress = [line for line in lines if line["type"] == "progress"]
    assert progress[-1] == {"type": "progress", "unit": "examples", "done": 611, "total": 611}
    assert all(line["done"] <= line["total"] == 611 for line in progress)
    for blob in node.blobs.glob("*/*"):
        blob.unlink()
    assert node.run(spec)[0] == 0


@pytest.fixture
def modules(node: Node) -> Callable[[], set[str]]:
    def load() -> set[str]:
        code = "import sys, gpu_service.planner.exact, gpu_service.planner.formats.chat_messages; print(*sys.modules)"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code]
        return set(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.split())

    return load


def test_no_training_library_is_imported(modules: Callable[[], set[str]]) -> None:
    assert not modules() & {"torch", "transformers", "grpc", "google.protobuf", "numpy", "peft"}
