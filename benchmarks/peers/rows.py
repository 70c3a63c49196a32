"""The rows of `make bench-gpu`: what is trained in each, and how ours is asked for it.

Every side of a row trains on the same weights and the same token stream, with the same rank, compute dtype and
optimizer. Measures nothing and imports no training library.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

# Gradients of every weight: `benchmarks.gpu_full_training` compares them.
FULL = "full"
DENSE_LENGTH = 2048
LORA_RANK = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LEARNING_RATE = 2e-4
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that is trained. `goal` is in the words of the documentation, for the table."""

    summary: str
    shape: str = "3B"
    # `dense`: rows of 2,048 tokens; `mixed`: instruction lengths.
    stream: str = "dense"
    tokens_per_step: int = 8192
    training_type: str = "qlora"
    # Added to what every row asks of ours. A field that this version does not have is left out.
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    # Fields without which ours does not offer the row.
    needs_fields: tuple[str, ...] = ()
    # What `benchmarks.gpu_training` calls the base whose gradients are compared, or FULL; empty where none are.
    gradient_base: str = ""
    # Sides are not on the device together: one needs nearly all of it.
    apart: bool = False
    # Peers that are measured when none is named, the strongest first.
    peers: tuple[str, ...] = ("unsloth", "trl", "transformers")

    def missing_fields(self, known: Container[str]) -> list[str]:
        """What ours would need for the row and does not have; `known` are the fields of Hyperparameters."""
        return [name for name in self.needs_fields if name not in known]

    def settings(self, num_steps: int, known: Container[str]) -> dict[str, Any]:
        """Hyperparameters of ours, as proto JSON; `known` are the fields that there are."""
        settings: dict[str, Any] = {
            "trainer": "fast",
            "num_steps": num_steps,
            "batch": {"tokens": str(self.tokens_per_step)},
            "max_length": DENSE_LENGTH,
            "loss_on": "all",
            "save_every_steps": 0,
            "optimizer": {
                "name": "adamw",
                "learning_rate": LEARNING_RATE,
                "weight_decay": 0.0,
                "max_gradient_norm": MAX_GRADIENT_NORM,
            },
            "schedule": {"name": "constant", "warmup_steps": 0},
            "quantization": {"compute_dtype": "bfloat16"},
        }
        if self.training_type == "qlora":
            settings["quantization"] |= {"method": "nf4", "double_quantization": True}
        if self.training_type != "full":
            settings["lora"] = {
                "rank": LORA_RANK,
                "alpha": LORA_RANK,
                "dropout": 0.0,
                "target_modules": list(TARGETS),
            }
        asked = {name: value for name, value in self.hyperparameters.items() if name in known}
        return {**settings, **asked}


# Restored from 4 bits at each use, nothing made again.
_STREAMED = {"base_weights": "streamed", "gradient_checkpointing": False}
# The same numbers, restored once and kept.
_RESIDENT = {"base_weights": "resident", "gradient_checkpointing": False}
# Frozen products of rounded numbers: faster, and not the same training.
_FP8 = {"compute": "fp8", "gradient_checkpointing": False}

ROWS: Mapping[str, Row] = {
    "dense": Row(summary="NF4 base, nothing recomputed, dense", hyperparameters=_STREAMED, gradient_base="nf4"),
    "mixed": Row(
        summary="NF4 base, nothing recomputed, mixed lengths",
        stream="mixed",
        hyperparameters=_STREAMED,
        gradient_base="nf4",
    ),
    "resident": Row(
        summary="NF4 values resident in bf16, dense",
        hyperparameters=_RESIDENT,
        needs_fields=("base_weights",),
        gradient_base="nf4-kept",
    ),
    "resident-mixed": Row(
        summary="NF4 values resident in bf16, mixed lengths",
        stream="mixed",
        hyperparameters=_RESIDENT,
        gradient_base="nf4-kept",
        needs_fields=("base_weights",),
    ),
    "recompute": Row(
        summary="NF4 base, every layer recomputed, dense",
        hyperparameters={**_STREAMED, "gradient_checkpointing": True},
        peers=("unsloth-recompute", "trl-recompute"),
    ),
    "least-memory": Row(
        summary="NF4 base, every layer recomputed in slices, inputs of layers in host memory, dense",
        hyperparameters={
            "base_weights": "streamed",
            "recomputation": {"full_layers": 28, "offload": True, "feed_forward_slices": 4},
        },
        needs_fields=("base_weights", "recomputation"),
        peers=("unsloth-recompute",),
    ),
    "fp8": Row(summary="NF4 values in fp8, another numerics, dense", hyperparameters=_FP8, needs_fields=("compute",)),
    "fp8-mixed": Row(
        summary="NF4 values in fp8, another numerics, mixed lengths",
        stream="mixed",
        hyperparameters=_FP8,
        needs_fields=("compute",),
    ),
    "8b": Row(summary="8B shape, NF4 base, dense, 16,384 tokens a step", shape="8B", tokens_per_step=16384, apart=True),
    "small": Row(
        summary="135M shape, NF4 base, mixed lengths, 2,048 tokens a step",
        shape="135M",
        stream="mixed",
        tokens_per_step=2048,
        hyperparameters=_STREAMED,
        gradient_base="nf4",
    ),
    "lora": Row(
        summary="bf16 base, never quantized, dense", training_type="lora", peers=("trl",), gradient_base="bf16"
    ),
    "full": Row(
        summary="full fine-tuning in bf16, weights and moments in float32, dense",
        training_type="full",
        apart=True,
        peers=("trl",),
        gradient_base=FULL,
    ),
    "full-low": Row(
        summary="full fine-tuning in little memory, other numerics, dense",
        training_type="full",
        hyperparameters={"full_memory": "low"},
        needs_fields=("full_memory",),
        peers=("trl-recompute",),
    ),
    # Show that everything runs; their figures mean nothing.
    "smoke": Row(summary="a tiny model", shape="tiny", tokens_per_step=4096, hyperparameters={"trainer": "auto"}),
    "smoke-mixed": Row(
        summary="a tiny model, mixed lengths",
        shape="tiny",
        stream="mixed",
        tokens_per_step=4096,
        hyperparameters={"trainer": "auto"},
    ),
}
