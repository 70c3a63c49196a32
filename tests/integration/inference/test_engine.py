"""Generations carried out on real tiny models: what comes out, and what they leave behind for the runs after them."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpu_service.engine.generation import decoding
from gpu_service.engine.resident import BaseShelf
from gpu_service.engine.stopping import StopMode, StopSwitch
from gpu_service.engine.training import random_state
from tests.fakes.engine_runs import Workspace, read_log
from tests.fakes.generations import InProcessEngine
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
    said = {}
    for used in (None, adapter):
        answered = engine.ask(QUESTION, model=model, adapter=used)
        said[used] = answered.text
        assert answered.text == reference(workspace, model, used).rstrip("\ufffd")
        assert answered.last["finish_reason"] == "LENGTH"
        statistics = answered.last["statistics"]
        assert statistics["num_tokens"] == answered.num_tokens == 12
        assert statistics["num_prompt_tokens"] > 5
        assert 0 < statistics["first_token_seconds"] <= statistics["seconds"]
        # The run before left the base.
        assert statistics["warm"] is True
        assert answered.last["resident"]["base_model"] == model
    assert said[None] != said[adapter]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_prompt_in_pieces_is_the_same_prompt(
    workspace: Workspace, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beyond a sliding window, which the second has."""
    directory = workspace.models_directory / workspace.place_model(TinyOptions(family=family))
    base: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompt = list(range(3, 203))

    def first_tokens() -> list[int]:
        tokens = decoding.generate(
            base,
            prompt,
            device=torch.device("cpu"),
            choose=lambda logits: int(logits.argmax()),
            before_each=lambda: None,
        )
        return [next(tokens) for _ in range(8)]

    with torch.no_grad():
        whole = first_tokens()
        monkeypatch.setattr(decoding, "PREFILL_TOKENS", 48)
        assert first_tokens() == whole


def test_a_seed_gives_the_same_draws_again_and_another_gives_others(engine: InProcessEngine, model: str) -> None:
    def draw(seed: int) -> str:
        return engine.ask(QUESTION, model=model, temperature=1.0, top_k=50, top_p=0.95, seed=seed).text

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_stop_string_ends_the_answer_before_it(engine: InProcessEngine, model: str) -> None:
    whole = engine.ask(QUESTION, model=model).text
    middle = whole[len(whole) // 2 :][:3]
    answered = engine.ask(QUESTION, model=model, stop=["never said", middle])
    assert answered.text == whole[: whole.index(middle)]
    assert answered.last["finish_reason"] == "STOP_STRING"


def test_a_stop_is_heard_at_the_next_token(engine: InProcessEngine, model: str) -> None:
    def stop(notice: dict[str, Any], switch: StopSwitch) -> None:
        if notice.get("text"):
            switch.request(StopMode.CANCEL)

    answered = engine.ask(QUESTION, model=model, max_new_tokens=400, on_notice=stop)
    assert sum(bool(notice.get("text")) for notice in answered.notices) == 1
    assert answered.last == {
        "type": "generated",
        "generation": "g",
        "done": True,
        "resident": engine.shelf.describe(),
    }
    assert not answered.ends_engine
    assert engine.shelf.describe()["base_model"] == model


def test_what_cannot_be_answered_is_refused_and_the_engine_goes_on(
    workspace: Workspace, engine: InProcessEngine, model: str
) -> None:
    too_long = engine.ask("two " * 2000, model=model)
    assert too_long.last["failure"]["reason"] == "PROMPT_TOO_LONG"
    assert too_long.last["failure"]["details"]["max_tokens"] == "512"
    base = workspace.place_model(TinyOptions(chat_template=False))
    missing = engine.ask([("system", "be brief"), ("user", QUESTION)], model=base)
    assert missing.last["failure"]["reason"] == "CHAT_TEMPLATE_MISSING"
    assert not too_long.ends_engine
    assert not missing.ends_engine
    # One user's turn needs no template, and a template of the catalog takes any.
    plain = engine.ask(QUESTION, model=base, max_new_tokens=2)
    turns = engine.ask(
        [("system", "be brief"), ("user", QUESTION)], model=base, max_new_tokens=2, chat_template="chatml"
    )
    assert plain.num_tokens == turns.num_tokens == 2
    assert turns.last["statistics"]["num_prompt_tokens"] > plain.last["statistics"]["num_prompt_tokens"]


def test_the_model_s_positions_end_an_answer(engine: InProcessEngine, model: str) -> None:
    num_prompt_tokens = engine.ask("two " * 200, model=model, max_new_tokens=1).last["statistics"]["num_prompt_tokens"]
    answered = engine.ask("two " * 200, model=model, max_new_tokens=1000)
    assert answered.last["statistics"]["num_tokens"] <= 512 - num_prompt_tokens
    if answered.last["finish_reason"] == "LENGTH":
        assert answered.last["statistics"]["num_tokens"] == 512 - num_prompt_tokens


@pytest.mark.parametrize("training_type", ["lora", "qlora"])
def test_a_run_after_a_generation_trains_as_without_it(
    workspace: Workspace, engine: InProcessEngine, model: str, adapter: Path, training_type: str
) -> None:
    """Bit for bit, on the warm base, with dropout, right behind an answer of another adapter on the same base."""
    options: dict[str, Any] = {
        "base_model": model,
        "training_type": training_type,
        "hyperparameters": {"num_steps": 3, "lora": {"rank": 4, "dropout": 0.2}},
    }
    engine.shelf = BaseShelf()
    without = engine.train(workspace.make_run(f"{training_type}-without", **options))
    engine.shelf = BaseShelf()
    # The base is loaded for the first answer, and the run finds it.
    quantization = "none" if training_type == "lora" else "nf4"
    cold = engine.ask(QUESTION, model=model, quantization=quantization)
    assert cold.last["statistics"]["warm"] is False
    answered = engine.ask(QUESTION, model=model, adapter=adapter, quantization=quantization, temperature=1.0)
    assert answered.last["finish_reason"]
    directory = workspace.make_run(f"{training_type}-after", **options)
    after = engine.train(directory)
    assert read_log(directory).stage_details("WEIGHTS").get("resident") == "true"
    first, second = load_file(without / "adapter_model.safetensors"), load_file(after / "adapter_model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_answer_takes_over_the_base_of_the_fast_path(
    workspace: Workspace, engine: InProcessEngine, model: str, adapter: Path
) -> None:
    """A base that was made without the libraries answers like one of theirs, and trains the same behind that."""
    options: dict[str, Any] = {"base_model": model, "hyperparameters": {"trainer": "fast", "num_steps": 3}}
    engine.shelf = BaseShelf()
    before = engine.train(workspace.make_run("fast-before", **options))
    warm = engine.ask(QUESTION, model=model, adapter=adapter, quantization="nf4")
    assert warm.last["statistics"]["warm"] is True
    directory = workspace.make_run("fast-after", **options)
    after = engine.train(directory)
    assert read_log(directory).stage_details("WEIGHTS").get("resident") == "true"
    name = "adapter_model.safetensors"
    assert (before / name).read_bytes() == (after / name).read_bytes()
    engine.shelf = BaseShelf()
    cold = engine.ask(QUESTION, model=model, adapter=adapter, quantization="nf4")
    assert cold.last["statistics"]["warm"] is False
    assert warm.text == cold.text


def test_no_random_state_is_touched(engine: InProcessEngine, model: str, adapter: Path) -> None:
    def draw() -> tuple[float, ...]:
        return (float(torch.rand(1)), random.random(), float(numpy.random.rand()))

    random_state.seed_all(3)
    expected = draw()
    random_state.seed_all(3)
    engine.ask(QUESTION, model=model, adapter=adapter, temperature=1.0)
    assert draw() == expected


def test_an_adapter_of_another_base_ends_the_engine(
    workspace: Workspace, engine: InProcessEngine, model: str, adapter: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "adapter"
    shutil.copytree(adapter, damaged)
    tensors = load_file(damaged / "adapter_model.safetensors")
    tensors.pop(min(tensors))
    save_file(tensors, damaged / "adapter_model.safetensors")
    answered = engine.ask(QUESTION, model=model, adapter=damaged)
    failure = answered.last["failure"]
    assert (failure["reason"], failure["exception_type"].rpartition(".")[2]) == ("GENERATION", "AdapterUnusable")
    assert answered.last["ends_engine"] is answered.ends_engine is True
    assert answered.last["resident"] == engine.shelf.describe() == {}


def test_a_checkpoint_answers_as_the_adapter_made_of_it(
    workspace: Workspace, engine: InProcessEngine, model: str, adapter: Path, tmp_path: Path
) -> None:
    lora = json.loads((adapter / "adapter_config.json").read_text())
    settings = {"rank": lora["r"], "alpha": lora["lora_alpha"]}
    (checkpoint,) = (adapter.parents[1] / "checkpoints").iterdir()
    answered = engine.ask(QUESTION, model=model, adapter=checkpoint, lora=settings)
    assert answered.text == engine.ask(QUESTION, model=model, adapter=adapter).text
    assert answered.text != engine.ask(QUESTION, model=model, adapter=checkpoint, lora=settings | {"alpha": 0.01}).text
    wrong = engine.ask(QUESTION, model=model, adapter=checkpoint, lora=settings | {"rank": 2})
    assert wrong.last["failure"]["exception_type"].rpartition(".")[2] == "AdapterUnusable"


def test_an_adapter_that_diverged_is_a_clean_failure(
    engine: InProcessEngine, model: str, adapter: Path, tmp_path: Path
) -> None:
    diverged = tmp_path / "adapter"
    shutil.copytree(adapter, diverged)
    tensors = load_file(diverged / "adapter_model.safetensors")
    save_file(
        {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()},
        diverged / "adapter_model.safetensors",
    )
    answered = engine.ask(QUESTION, model=model, adapter=diverged)
    assert answered.last["failure"]["reason"] == "GENERATION"
    assert not answered.ends_engine
    assert engine.ask(QUESTION, model=model, max_new_tokens=1).last["statistics"]["warm"] is True
