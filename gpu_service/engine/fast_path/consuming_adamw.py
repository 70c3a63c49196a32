"""AdamW with moments of 8 bits over bfloat16 weights, stepping each weight as soon as its gradient is made.

Its state is flat: codes and scales of all moments. It is its own, and the plain path does not go on from it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from gpu_service.engine.fast_path.adam_8bit import BLOCK
from gpu_service.engine.fast_path.full_low_memory import LowMemoryModel
from gpu_service.engine.fast_path.full_optimizer import FullOptimizer
from gpu_service.engine.fast_path.full_weights import Region
from tunesmith.common.v1 import training_spec_pb2

_STEP = "step"
_MOMENTS = ("first_codes", "first_scales", "second_codes", "second_scales")
# Different chances in different steps; odd, so that no two of 2^32 steps have the same key.
_KEY_STRIDE, _WORD = 0x9E3779B1, 0xFFFFFFFF


class ConsumingAdamW(FullOptimizer):
    """Each gradient is made in the step itself, and gone after it."""

    def __init__(
        self, model: LowMemoryModel, settings: training_spec_pb2.Optimizer, *, seed: int, kernels: Any = None
    ) -> None:
        """`seed` is of the chance by which weights and moments are rounded. `kernels` None are the device's own."""
        weights = model.weights
        super().__init__(weights.held, weights.num_matrix_elements, settings)
        self._model, self._held, self._boundary = model, weights.held, weights.num_matrix_elements
        device, count = self._held.device, self._held.numel()
        num_blocks = -(-count // BLOCK)
        self._kernels = kernels or import_module(
            f"gpu_service.engine.fast_path.{'adam_8bit_kernels' if device.type == 'cuda' else 'adam_8bit'}"
        )
        self._moments = (
            torch.zeros(count, device=device, dtype=torch.int8),
            torch.zeros(num_blocks, device=device),
            torch.zeros(count, device=device, dtype=torch.uint8),
            torch.zeros(num_blocks, device=device),
        )
        self._seed = seed

    @torch.no_grad()
    def clip(self, limit: float) -> torch.Tensor:
        """The gradient's norm, float32 on the device, by a backward pass; the next step takes no more than `limit`."""
        norms: list[torch.Tensor] = []
        self._model.sweep(
            lambda region, gradient: norms.append(torch.linalg.vector_norm(gradient, dtype=torch.float32)),
            is_last=False,
        )
        norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros_like(self._steps)
        self._clip_by(norm, limit)
        return norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step, by a second backward pass; without a pass to go back through, nothing. Has no closure to call."""
        del closure
        if self._model.is_empty:
            return
        of_groups = self._begin_step()
        key = (self._steps.long() * _KEY_STRIDE + self._seed) & _WORD

        def consume(region: Region, gradient: torch.Tensor) -> None:
            numbers, settings = of_groups[int(region.start >= self._boundary)]
            part, blocks = slice(region.start, region.stop), slice(region.start // BLOCK, -(-region.stop // BLOCK))
            codes_first, scales_first, codes_second, scales_second = self._moments
            self._kernels.step_adamw_8bit(
                self._held[part],
                gradient.flatten(),
                (codes_first[part], scales_first[blocks], codes_second[part], scales_second[blocks]),
                numbers,
                settings,
                key=key.view(1),
                first_element=region.start,
            )

        self._model.sweep(consume, is_last=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the pass that was made."""
        del set_to_none
        self._model.drop()
        self._forget_clipping()

    def state_dict(self) -> dict[str, Any]:
        """One entry, of all weights as they lie in the flat buffer."""
        state: dict[int, dict[str, Any]] = {}
        if self._has_state:
            state[0] = {_STEP: self._steps, **dict(zip(_MOMENTS, self._moments, strict=True))}
        return {"state": state, "param_groups": super().state_dict()["param_groups"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` gave. Raises ValueError when it is of other weights or another optimizer."""
        entries, groups = state_dict["state"], state_dict["param_groups"]
        own = dict(zip(_MOMENTS, self._moments, strict=True))
        found = entries.get(0, {})
        if len(groups) != len(self.param_groups) or (entries and (set(entries) != {0} or not set(own) <= set(found))):
            raise ValueError("the state is of another optimizer")
        if any(found[name].shape != buffer.shape for name, buffer in own.items() if entries):
            raise ValueError("the optimizer's state is of other weights")
        self._load_groups(groups)
        self._has_state = bool(entries)
        if entries:
            self._steps = found[_STEP].to(self._steps)
        for name, buffer in own.items():
            if entries:
                buffer.copy_(found[name])
            else:
                buffer.zero_()
