"""What a run leaves loads elsewhere: in a fresh process with nothing of ours, with the held-out loss of before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpu_service.domain.planned_data import PlannedData
from tests.fakes.engine_runs import Workspace

_TIMEOUT_SECONDS = 110

# Arguments: what to load as JSON. Prints the loss of every example's targets and the rendered chat.
_LOAD = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

torch.set_num_threads(1)
asked = json.loads(sys.stdin.read())
if asked["base"] is None:
    model = AutoModelForCausalLM.from_pretrained(asked["artifact"])
else:
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(asked["base"], quantization_config=quantization, dtype=torch.float32)
    # In evaluation mode some CPUs compute 4-bit layers in bfloat16; dropout is 0 here, so the other mode is the same.
    model = PeftModel.from_pretrained(base, asked["artifact"]).train()
tokenizer = AutoTokenizer.from_pretrained(asked["artifact"])
nats = targets = 0
with torch.no_grad():
    for tokens, mask in asked["examples"]:
        logits = model(input_ids=torch.tensor([tokens])).logits[0].float()
        losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="none")
        wanted = torch.tensor(mask[1:], dtype=torch.bool)
        nats += float(losses[wanted].double().sum())
        targets += int(wanted.sum())
chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
print(json.dumps({"loss": nats / targets, "chat": chat}))
"""


def _load_elsewhere(base: Path | None, artifact: Path, data: PlannedData) -> dict[str, Any]:
    examples = [data.example(reference) for reference in data.held_out_examples()]
    asked = {
        "base": None if base is None else str(base),
        "artifact": str(artifact),
        "examples": [(example.tokens.tolist(), example.mask.tolist()) for example in examples],
    }
    finished = subprocess.run(
        [sys.executable, "-c", _LOAD],
        input=json.dumps(asked),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=_TIMEOUT_SECONDS,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    loaded: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return loaded


def _open_data(workspace: Workspace, data_digest: str) -> PlannedData:
    for path in workspace.cache_directory.rglob("plan.json"):
        if json.loads(path.read_text())["data_digest"] == data_digest:
            return PlannedData.open(path.parent)
    raise AssertionError("the run's plan is not in the cache")


@pytest.mark.parametrize(("training_type", "artifact"), [("qlora", "adapter"), ("full", "model")])
def test_artifact_gives_the_same_loss_in_a_fresh_process(
    training_type: str, artifact: str, workspace: Workspace, run_in_process: Any
) -> None:
    directory = workspace.make_run(f"kept-{training_type}", training_type=training_type)
    log = run_in_process(directory)
    (plan,) = log.of("plan")
    base = workspace.models_directory / "tiny/llama" if artifact == "adapter" else None

    loaded = _load_elsewhere(base, directory / "artifacts" / artifact, _open_data(workspace, plan.data_digest))

    before, after = log.of("evaluation")[0].loss, log.of("evaluation")[-1].loss
    assert loaded["loss"] == pytest.approx(after, rel=1e-6)
    assert abs(after - before) > 1e-4
    assert loaded["chat"] == "<|im_start|>user\nHello<|im_end|>\n"


def test_adapter_says_where_it_comes_from(workspace: Workspace, run_in_process: Any) -> None:
    directory = workspace.make_run("card", chat=False, hyperparameters={"chat_template": "chatml"})
    log = run_in_process(directory)
    (plan,) = log.of("plan")
    adapter = directory / "artifacts/adapter"

    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny/llama"
    assert sorted(config["target_modules"]) == sorted(plan.resolved.lora.target_modules)
    card = (adapter / "README.md").read_text()
    for said in (plan.data_digest, plan.weights_digest, "arithmetic", "coding", '"rank": 4', "Held-out loss"):
        assert said in card
    assert str(workspace.root) not in card
    assert str(workspace.root) not in (adapter / "adapter_config.json").read_text()
    # The template that the project named goes with the adapter.
    assert "<|im_start|>" in (adapter / "chat_template.jinja").read_text()
    assert not list(adapter.rglob("*.bin"))
    (event,) = (event for event in log.of("artifact") if event.name == "adapter")
    assert {file.path for file in event.files} == {
        path.relative_to(adapter).as_posix() for path in adapter.rglob("*") if path.is_file()
    }
