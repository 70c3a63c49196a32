"""AdamW over the flat buffer in one launch, whose saved state is that of the plain path: one entry a PEFT parameter.

So a checkpoint of one path says the same as the other's, and either goes on from it.
"""

from __future__ import annotations

from typing import Any

import torch

from gpu_service.engine.deferred_compile import unhidden
from gpu_service.engine.fast_path.adapters import FlatAdapter
from tunesmith.common.v1 import training_spec_pb2

_MOMENTS = ("exp_avg", "exp_avg_sq")
# Nothing here is compiled, and the compiler takes seconds to import.
unhidden(torch.optim.Optimizer, ("add_param_group", "zero_grad", "state_dict", "load_state_dict"))


class FlatAdamW(torch.optim.AdamW):
    """torch's fused AdamW. Every trained tensor is a matrix, so that weight decay applies to the whole buffer."""

    def __init__(self, adapter: FlatAdapter, settings: training_spec_pb2.Optimizer) -> None:
        self._adapter = adapter
        super().__init__(
            [adapter.parameter],
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def leave_out(self, flag: torch.Tensor) -> None:
        """Steps do nothing while `flag`, a float32 scalar on the device, is 1 there; asked for again before each."""
        # The name by which torch's fused kernels know it.
        self.found_inf = flag

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One launch, of torch's own kernel: torch's method around it would import its compiler, which takes seconds.

        Does nothing without a gradient. Takes no closure.
        """
        assert closure is None
        (group,) = self.param_groups
        parameter: torch.Tensor = group["params"][0]
        if parameter.grad is None:
            return
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in _MOMENTS:
                state[name] = torch.zeros_like(parameter)
        state["step"] += 1
        flag: torch.Tensor | None = getattr(self, "found_inf", None)
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            [parameter],
            [parameter.grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            amsgrad=False,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            grad_scale=None,
            found_inf=flag,
        )
        if flag is not None:
            state["step"] -= flag

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.AdamW over PEFT's parameters would give it; moments are views of the flat ones."""
        whole = super().state_dict()
        (group,) = whole["param_groups"]
        state: dict[int, dict[str, Any]] = {}
        for entry in whole["state"].values():
            moments = [self._adapter.views(entry[name]) for name in _MOMENTS]
            for number, views in enumerate(zip(*moments, strict=True)):
                state[number] = {"step": entry["step"], **dict(zip(_MOMENTS, views, strict=True))}
        numbers = list(range(self._adapter.num_tensors))
        return {"state": state, "param_groups": [{**group, "fused": None, "params": numbers}]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what either path saved. Raises ValueError when it is of other parameters."""
        (group,) = state_dict["param_groups"]
        entries = state_dict["state"]
        if len(group["params"]) != self._adapter.num_tensors or len(entries) not in (0, self._adapter.num_tensors):
            raise ValueError(f"the optimizer's state is of {len(group['params'])} parameters")
        state: dict[int, dict[str, Any]] = {}
        if entries:
            flat = {name: torch.zeros_like(self._adapter.parameter.detach()) for name in _MOMENTS}
            for name, buffer in flat.items():
                for number, view in enumerate(self._adapter.views(buffer)):
                    view.copy_(entries[number][name])
            state[0] = {"step": entries[0]["step"], **flat}
        super().load_state_dict({"state": state, "param_groups": [{**group, "fused": True, "params": [0]}]})
