"""Generations carried out on real tiny models: what comes out, and what they leave behind for the runs after them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.integration.inference.conftest import InProcessEngine
from tests.fakes.engine_runs import Workspace
from tests.fakes.tiny_models import TinyOptions

QUESTION = "What is two plus two?"


@pytest.fixture(scope="module")
def model(workspace: Workspace) -> str:
    return workspace.place_model(TinyOptions())


@pytest.fixture(scope="module")
def adapter(workspace: Workspace, engine: InProcessEngine, model: str) -> Path:
    """Of a short training with a high rate, so that it says something else than the base."""
    return engine.train(workspace.make_run("trained", base_model=model, training_type="lora"))


def reference(workspace: Workspace, model: str, adapter: Path | None, max_new_tokens: int = 12) -> str:
    """What transformers' own greedy generation says."""
    directory = workspace.models_directory / model
    base: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    answering = base if adapter is None else PeftModel.from_pretrained(base, str(adapter))
    encoded = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = answering.eval().generate(
        **encoded, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
    )
    text: str = tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def test_greedy_answers_are_those_of_transformers(
    workspace: Workspace, engine: InProcessEngine, model: str, adapter: Path
) -> None:
    for used in (None, adapter):
        answered = engine.ask(QUESTION, model=model, adapter=used)
        print(answered.notices)
        assert answered.text == reference(workspace, model, used).rstrip("\ufffd")
