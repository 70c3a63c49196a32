"""The real thing on a CPU: SmolLM2 in 4 bits, a PEFT adapter, and the demo with fewer steps."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.fakes.pair import running_pair, wait_for
from tests.fakes.real_model import SMOLLM
from tunesmith.common.v1 import event_pb2, training_spec_pb2

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]

# Loads the adapter onto the base with the library that people will use it with, and says what it added.
LOAD_WITH_PEFT = """
import json, sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, sys.argv[2])
lora_b = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
print(json.dumps({"layers": len(lora_b), "trained": sum(bool(p.abs().sum() > 0) for p in lora_b)}))
"""


def test_qlora_on_smollm_leaves_an_adapter_that_peft_loads(real_models: Path, tmp_path: Path) -> None:
    with running_pair(tmp_path / "data", real_models, SMOLLM) as pair:
        project = pair.project(
            "real",
            num_steps=2,
            training_type="qlora",
            max_length=128,
            batch=training_spec_pb2.Batch(examples=2),
            lora=training_spec_pb2.Lora(rank=4),
        )
        plan = pair.client.jobs.plan(project.project_id).plan
        job = pair.client.jobs.start(project.project_id)
        events = list(pair.client.jobs.watch(job.job_id))
        pair.client.jobs.wait(job.job_id)
        pair.client.artifacts.download(job.job_id, "adapter", tmp_path / "adapter")
    stages = [
        event.payload.loading.stage
        for event in events
        if event.kind == event_pb2.EVENT_KIND_LOADING
        and event.payload.loading.status == event_pb2.STAGE_STATUS_FINISHED
    ]
    assert stages == [
        event_pb2.LOADING_STAGE_CONFIG,
        event_pb2.LOADING_STAGE_TOKENIZER,
        event_pb2.LOADING_STAGE_WEIGHTS,
        event_pb2.LOADING_STAGE_QUANTIZATION,
        event_pb2.LOADING_STAGE_ADAPTER,
    ]
    (realized,) = [event.payload.realized for event in events if event.kind == event_pb2.EVENT_KIND_REALIZED]
    assert realized.data_digest == plan.data_digest
    assert (realized.num_steps, realized.total_tokens) == (plan.num_steps, plan.total_tokens)
    (planned,), (row,) = plan.datasets, realized.datasets
    assert row.run_examples == planned.run_examples == plan.total_examples
    assert (row.run_tokens, row.run_target_tokens) == (planned.run_tokens, planned.run_target_tokens)
    (measured,) = [
        event.payload.memory_measured for event in events if event.kind == event_pb2.EVENT_KIND_MEMORY_MEASURED
    ]
    assert measured.predicted_bytes == plan.memory.peak_bytes
    # A part of it is what another C library makes of its heap.
    assert measured.peak_bytes == pytest.approx(measured.predicted_bytes, rel=0.3)
    command = [sys.executable, "-c", LOAD_WITH_PEFT, str(real_models / SMOLLM), str(tmp_path / "adapter")]
    loaded = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)
    assert loaded == {"layers": plan.num_covered_linears, "trained": plan.num_covered_linears}


def demo_command(directory: Path, models: Path, *options: str) -> list[str]:
    command = [sys.executable, "-m", "tunesmith_cli.main", "demo", "--directory", str(directory)]
    return [*command, "--models", str(models), *options]


def shortened_examples(directory: Path) -> Path:
    """The demo's own examples, with few held-out rows and short answers: most of its time goes there."""
    examples = ROOT / "examples"
    (directory / "data").mkdir(parents=True)
    for file in (examples / "data").glob("*.jsonl"):
        rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = rows[:4] if "held-out" in file.name else rows
        (directory / "data" / file.name).write_text("".join(kept), encoding="utf-8")
    project = yaml.safe_load((examples / "demo_project.yaml").read_text(encoding="utf-8"))
    project["sample_prompts"] = [prompt | {"max_new_tokens": 4} for prompt in project["sample_prompts"][:2]]
    (directory / "demo_project.yaml").write_text(yaml.safe_dump(project), encoding="utf-8")
    return directory


def test_the_demo_teaches_and_shows_it(real_models: Path, tmp_path: Path) -> None:
    options = ("--steps", "10", "--examples", str(shortened_examples(tmp_path / "examples")))
    command = demo_command(tmp_path / "demo", real_models, *options)
    result = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Held-out loss" in result.stdout
    assert "DID NOT FALL" not in result.stdout
    files = {path.name for path in (tmp_path / "demo" / "output").rglob("*") if path.is_file()}
    assert {"adapter_model.safetensors", "adapter_config.json", "loss.png"} <= files


def test_an_interrupted_demo_stops_both_services(real_models: Path, tmp_path: Path) -> None:
    log = tmp_path / "demo.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            demo_command(tmp_path, real_models, "--examples", str(ROOT / "examples")),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for("the services", lambda: "control at" in log.read_text() or process.poll() is not None, seconds=120)
        pids = [json.loads(file.read_text())["pid"] for file in (tmp_path / "run").glob("*.json")]
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
