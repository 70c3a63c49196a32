"""`qlora`: the same adapter as `lora`, over a quantized base that PEFT has prepared for it."""

from __future__ import annotations

from typing import Any

from peft import prepare_model_for_kbit_training

from gpu_service.engine.builders.methods.lora import attach, base_dtype, count_covered, detach

__all__ = ["TRAINS_ADAPTER", "attach", "base_dtype", "count_covered", "detach", "prepare_base"]

TRAINS_ADAPTER = True


def prepare_base(model: Any) -> None:
    """Freeze the base and hold what is not quantized (norms, embeddings, head) in float32.

    Recomputation of activations is switched per run, when the adapter is attached.
    """
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
