"""The first weights of an adapter that is drawn where it trains, against PEFT's own."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model

from gpu_service.engine.builders.methods.lora import draw_adapter
from tests.fakes.flat_models import make_model

_CONFIG = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"])


def _trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def test_they_are_drawn_as_peft_draws_them() -> None:
    plain = _trained(get_peft_model(make_model("llama", {}, torch.float32), _CONFIG))
    model = get_peft_model(make_model("llama", {}, torch.float32), _CONFIG, low_cpu_mem_usage=True)
    assert all(value.device.type == "meta" for value in _trained(model).values())
    torch.manual_seed(5)
    draw_adapter(model, torch.device("cpu"))
    drawn = _trained(model)
    assert list(drawn) == list(plain)
    for name, value in drawn.items():
        assert value.dtype == plain[name].dtype == torch.float32
        if "lora_B" in name:
            assert not value.any()
            continue
        bound = value.shape[1] ** -0.5
        # Both fill the same interval, to its ends and evenly.
        for weights in (value, plain[name]):
            assert 0.95 * bound < weights.abs().max() <= bound
            assert abs(weights.std() / bound - 3**-0.5) < 0.05


def test_they_follow_from_the_seed() -> None:
    found = []
    for _ in range(2):
        model = get_peft_model(make_model("llama", {}, torch.float32), _CONFIG, low_cpu_mem_usage=True)
        torch.manual_seed(5)
        draw_adapter(model, torch.device("cpu"))
        found.append(_trained(model))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
