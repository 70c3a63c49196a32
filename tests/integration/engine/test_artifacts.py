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

# Standard input: what to load, as JSON. Prints, for each, the loss of every example's targets and the rendered chat.
_LOAD = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

torch.set_num_threads(1)

def load(asked):
    if asked["base"] is None:
        return AutoModelForCausalLM.from_pretrained(asked["artifact"])
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(asked["base"], quantization_config=quantization, dtype=torch.float32)
    # In evaluation mode some CPUs compute 4-bit layers in bfloat16; dropout is 0 here, so the other mode is the same.
    return PeftModel.from_pretrained(base, asked["artifact"]).train()

def judge(asked):
    model, tokenizer = load(asked), AutoTokenizer.from_pretrained(asked["artifact"])
    nats = targets = 0
    with torch.no_grad():
        for tokens, mask in asked["examples"]:
            logits = model(input_ids=torch.tensor([tokens])).logits[0].float()
            losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="none")
            wanted = torch.tensor(mask[1:], dtype=torch.bool)
            nats += float(losses[wanted].double().sum())
            targets += int(wanted.sum())
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    return {"loss": nats / targets, "chat": chat}

print(json.dumps([judge(asked) for asked in json.loads(sys.stdin.read())]))
"""


def _describe(base: Path | None, artifact: Path, data: PlannedData) -> dict[str, Any]:
    examples = [data.example(reference) for reference in data.held_out_examples()]
    return {
        "base": None if base is None else str(base),
        "artifact": str(artifact),
        "examples": [(example.tokens.tolist(), example.mask.tolist()) for example in examples],
    }


def _load_elsewhere(asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    finished = subprocess.run(
        [sys.executable, "-c", _LOAD],
        input=json.dumps(asked),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=_TIMEOUT_SECONDS,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    loaded: list[dict[str, Any]] = json.loads(finished.stdout.splitlines()[-1])
    return loaded


def test_artifacts_give_the_same_loss_in_a_fresh_process(workspace: Workspace, run_in_process: Any) -> None:
    """An adapter on its base and a whole model; one process loads both, because it takes long to start."""
    logs, asked = [], []
    for training_type, artifact in (("qlora", "adapter"), ("full", "model")):
        directory = workspace.make_run(f"kept-{training_type}", training_type=training_type)
        log = run_in_process(directory)
        (plan,) = log.of("plan")
        base = workspace.models_directory / "tiny/llama" if artifact == "adapter" else None
        asked.append(_describe(base, directory / "artifacts" / artifact, workspace.open_data(plan.data_digest)))
        logs.append(log)

    for log, loaded in zip(logs, _load_elsewhere(asked), strict=True):
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
    assert plan.weights_digest == json.loads((directory / "run.json").read_text())["weights_digest"]
    for said in (plan.data_digest, plan.weights_digest, "arithmetic", "coding", '"rank": 4', "Held-out loss"):
        assert said in card
    for said in ("base_model_relation: adapter", "library_name: peft", "| base | 0 |", "| final | 2 |", "Mix: "):
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
