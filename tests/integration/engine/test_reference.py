"""A run's steps against the same steps written by hand with plain transformers and PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gpu_service.domain.planned_data import Example, PlannedData
from tests.fakes.engine_runs import Workspace

_NUM_STEPS = 3
_LEARNING_RATE, _WEIGHT_DECAY, _MAX_NORM = 1e-2, 0.1, 0.5
# Marks what transformers' own loss leaves out.
_IGNORED = -100
# Any id: the mask hides it.
_PADDING = 7


def _pad(examples: list[Example]) -> dict[str, torch.Tensor]:
    """The whole step as one padded batch, with labels for transformers' own loss."""
    longest = max(len(example.tokens) for example in examples)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for example in examples:
        tokens, rest = example.tokens.tolist(), longest - len(example.tokens)
        labels = [token if carries else _IGNORED for token, carries in zip(tokens, example.mask, strict=True)]
        rows["input_ids"].append(tokens + [_PADDING] * rest)
        rows["attention_mask"].append([1] * len(tokens) + [0] * rest)
        rows["labels"].append(labels + [_IGNORED] * rest)
    return {name: torch.tensor(values) for name, values in rows.items()}


def _train_by_hand(model_path: str, data: PlannedData, lora: Any, seed: int) -> tuple[list[float], list[float], Any]:
    """Loss and gradient norm of each step, and the adapter after the last."""
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    torch.manual_seed(seed)
    targets = list(lora.target_modules)
    config = LoraConfig(task_type="CAUSAL_LM", r=lora.rank, lora_alpha=lora.alpha, target_modules=targets)
    model = get_peft_model(base, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    losses, norms = [], []
    for step in range(_NUM_STEPS):
        examples = [data.example(reference) for reference in data.step_examples(step)]
        assert len({len(example.tokens) for example in examples}) > 1
        loss = model(**_pad(examples)).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, _MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, get_peft_model_state_dict(model)


def test_steps_are_those_of_plain_transformers_and_peft(workspace: Workspace, run_in_process: Any) -> None:
    """Examples of other lengths in uneven passes (3, 3 and 2) come to the mean over the step's target tokens."""
    directory = workspace.make_run(
        "reference",
        training_type="lora",
        hyperparameters={
            "num_steps": _NUM_STEPS,
            "batch": {"examples": 8, "micro_batch_examples": 3},
            "optimizer": {
                "learning_rate": _LEARNING_RATE,
                "weight_decay": _WEIGHT_DECAY,
                "max_gradient_norm": _MAX_NORM,
            },
            "schedule": {"name": "constant", "warmup_steps": 0},
            "seed": 5,
        },
        held_out=False,
    )
    log = run_in_process(directory)
    (plan,) = log.of("plan")

    losses, norms, adapter = _train_by_hand(
        str(workspace.models_directory / "tiny/llama"),
        workspace.open_data(plan.data_digest),
        plan.resolved.lora,
        plan.resolved.seed,
    )

    assert list(log.losses.values()) == pytest.approx(losses, rel=1e-5)
    assert [event.gradient_norm for event in log.of("step")] == pytest.approx(norms, rel=1e-4)
    assert max(norms) > _MAX_NORM
    saved = load_file(directory / "artifacts/adapter/adapter_model.safetensors")
    assert saved.keys() == adapter.keys()
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, adapter[name], rtol=1e-3, atol=1e-4)
