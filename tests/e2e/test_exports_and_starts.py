"""The training page's examples of exporting a job and starting from it, run as they stand, on a tiny model."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.fakes.pair import PairUnderTest, running_pair
from tests.fakes.tiny_models import place
from tunesmith.common.v1 import event_pb2, training_spec_pb2
from tunesmith_client import FailedPrecondition

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]


def example(name: str) -> str:
    """The fenced block after `<!-- runs: name -->`."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- runs: {name} -->\n```\w+\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


def commands(name: str) -> list[str]:
    return [line.removeprefix("$ ") for line in example(name).splitlines()]


@pytest.fixture
def tiny_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PairUnderTest]:
    """Both services with the real engine."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    base_model = place(tmp_path / "models")
    with running_pair(tmp_path / "data", tmp_path / "models", base_model) as pair:
        yield pair


def run_command(pair: PairUnderTest, line: str, directory: Path, **names: str) -> None:
    for name, value in names.items():
        line = line.replace(f'"${name}"', value)
    program, *arguments = shlex.split(line)
    assert program == "tunesmith"
    subprocess.run(
        [sys.executable, "-m", "tunesmith_cli.main", *arguments],
        check=True,
        cwd=directory,
        timeout=200,
        env={**os.environ, "TUNESMITH_ADDRESS": pair.pair.address, "PYTHONPATH": f"{ROOT}:{ROOT / 'clients/python'}"},
    )


def newest_job(pair: PairUnderTest) -> str:
    return next(pair.client.jobs.list()).job_id


def first_loss(events: list[event_pb2.Event]) -> float:
    """The loss of the first step, before anything of this job was learned."""
    return next(event.payload.step.loss for event in events if event.kind == event_pb2.EVENT_KIND_STEP)


def test_the_examples_of_the_training_page(tiny_pair: PairUnderTest, tmp_path: Path) -> None:
    project = tiny_pair.project(
        "page",
        num_steps=6,
        training_type="qlora",
        max_length=64,
        batch=training_spec_pb2.Batch(examples=20),
        optimizer=training_spec_pb2.Optimizer(learning_rate=1e-2),
        lora=training_spec_pb2.Lora(rank=4),
    )
    first = tiny_pair.client.jobs.wait(tiny_pair.client.jobs.start(project.project_id).job_id)
    of_base = first_loss(tiny_pair.log(first.job_id))

    export, download = commands("export")
    run_command(tiny_pair, export, tmp_path, JOB=first.job_id)
    exported = newest_job(tiny_pair)
    run_command(tiny_pair, download, tmp_path, EXPORT=exported)
    phases = [event.payload.phase.phase for event in tiny_pair.log(exported) if event.payload.HasField("phase")]
    assert phases == [event_pb2.PHASE_LOADING, event_pb2.PHASE_SAVING, event_pb2.PHASE_COLLECTING]
    with pytest.raises(FailedPrecondition) as refused:
        tiny_pair.client.artifacts.export(first.job_id, "gguf")
    assert refused.value.reason == "NOT_OFFERED"
    # What the page then loads; a test of the engine's exports runs that.
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "merged").iterdir()
    }

    (start,) = commands("start")
    run_command(tiny_pair, start, tmp_path, PROJECT=project.name, JOB=first.job_id)
    later = newest_job(tiny_pair)
    assert first_loss(tiny_pair.log(later)) < of_base
