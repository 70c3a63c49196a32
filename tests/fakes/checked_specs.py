"""A spec and a base that go together, to be changed until they don't. Reads no file."""

import copy
from pathlib import Path
from typing import Any

from gpu_service.catalog.base_models import BaseModel, LinearLayer
from gpu_service.domain.plan import CheckedPlan, Device, resolve
from gpu_service.domain.spec import TrainingSpec

CPU = Device()
LEAVES = (("self_attn.q_proj", 64, 64), ("self_attn.v_proj", 64, 32), ("mlp.down_proj", 128, 64))


def make_base(**changes: Any) -> BaseModel:
    layers = tuple(
        LinearLayer(path=f"model.layers.{layer}.{path}", in_features=inner, out_features=outer)
        for layer in range(2)
        for path, inner, outer in LEAVES
    )
    facts: dict[str, Any] = {
        "name": "tiny/llama",
        "directory": Path("tiny/llama"),
        "config_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_layers": 2,
        "vocabulary_size": 512,
        "max_position_embeddings": 512,
        "linear_layers": layers,
        "num_parameters": 100_000,
        "has_chat_template": True,
    }
    return BaseModel(**{**facts, **changes})


def make_spec(**changes: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "base_model": "tiny/llama",
        "model_type": "llama",
        "training_type": "qlora",
        "traits": [
            {
                "trait_type": "a",
                "datasets": [{"dataset_id": 1, "percentage": 50}, {"dataset_id": 2, "percentage": 50}],
                "held_out_dataset_ids": [3],
            }
        ],
        "hyperparameters": {},
        "datasets": [
            {"dataset_id": 1, "format": "chat-messages", "num_examples": "60"},
            {"dataset_id": 2, "format": "prompt-completion", "num_examples": "100"},
            {"dataset_id": 3, "format": "text", "num_examples": "10"},
        ],
    }
    return {**copy.deepcopy(spec), **changes}


def plan(spec: dict[str, Any], base: BaseModel | None = None, device: Device = CPU, **versions: str) -> CheckedPlan:
    return resolve(TrainingSpec.from_json(spec), base or make_base(), device, versions)


def hyper(**values: Any) -> dict[str, Any]:
    return make_spec(hyperparameters=values)
