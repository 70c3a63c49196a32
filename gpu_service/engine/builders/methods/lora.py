"""`lora`: a PEFT low-rank adapter over a frozen base. The adapter is float32; the base is held in the compute type."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from tunesmith.common.v1 import training_spec_pb2

TRAINS_ADAPTER = True
# transformers renamed the switch in the course of 5.x, and warns of the old name where it has the new one.
_SWITCH = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)


def base_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """Type that the base's unquantized weights are held in."""
    return compute_dtype


def prepare_base(model: Any) -> None:
    """Nothing: PEFT freezes the base itself."""
    del model


def attach(base: Any, base_model: str, hyperparameters: training_spec_pb2.Hyperparameters) -> Any:
    """A PEFT model around `base`. Raises ValueError when no layer matches the targets."""
    # PEFT writes the base's name into the adapter's config: the model's name, never a path of this machine.
    base.name_or_path = base_model
    set_gradient_checkpointing(base, hyperparameters.gradient_checkpointing)
    config = make_config(hyperparameters.lora)
    device = next(base.parameters()).device
    if device.type == "cpu":
        return get_peft_model(base, config)
    # PEFT draws three times as many numbers as there are weights, on the host, and copies each matrix by itself.
    model = get_peft_model(base, config, low_cpu_mem_usage=True)
    draw_adapter(model, device)
    return model


def make_config(lora: training_spec_pb2.Lora) -> LoraConfig:
    """PEFT's config of the plan's adapter, which does not name the base yet."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        lora_dropout=lora.dropout,
        # The plan names every linear layer but the head unless the project named its own.
        target_modules=list(lora.target_modules),
        bias="none",
    )


def draw_adapter(model: Any, device: torch.device) -> None:
    """Give adapters that are on no device yet their first weights there, from its own generator: A as PEFT draws it
    (uniform within one by the root of what it reads), B zero.
    """
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        for name, below in module.lora_A.items():
            above = module.lora_B[name]
            bound = below.in_features**-0.5
            first = torch.empty(below.weight.shape, device=device).uniform_(-bound, bound)
            below.weight = torch.nn.Parameter(first)
            above.weight = torch.nn.Parameter(torch.zeros(above.weight.shape, device=device))


def set_gradient_checkpointing(model: Any, enabled: bool) -> None:
    """Switch recomputation of activations; a resident base comes from a run that may have had it otherwise."""
    if enabled:
        getattr(model, f"{_SWITCH}_enable")({"use_reentrant": False})
    elif any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        getattr(model, f"{_SWITCH}_disable")()
    # The switch makes embeddings ask for gradients, which re-entrant recomputation alone needs, and never takes that
    # back; PEFT adds its own and forgets the first. A base that is kept must not carry it into other runs.
    if getattr(model, "_require_grads_hook", None) is not None:
        model.disable_input_require_grads()


def count_covered(model: Any) -> int:
    """Linear layers that got an adapter."""
    return sum(isinstance(module, LoraLayer) for module in model.modules())


def detach(model: Any) -> Any:
    """Take the adapter's layers out and return the base as it was."""
    base = model.unload()
    set_gradient_checkpointing(base, False)
    return base
