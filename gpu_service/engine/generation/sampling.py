"""Chooses one token from the logits of a step. Draws from its own generator, never from the process' random state."""

from __future__ import annotations

import torch

from gpu_service.engine.generation.order import Sampling


class LogitsNotFinite(ArithmeticError):
    """The model's logits hold a NaN, or nothing but minus infinity: a training that diverged, as a rule."""


class TokenChooser:
    """Temperature, then the most likely `top_k`, then the fewest whose probabilities reach `top_p`; then a draw."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        # On the CPU whatever the device is, so that a draw there disturbs no generator that training uses.
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits: torch.Tensor) -> int:
        """The next token's id. `logits` float [vocabulary]. Raises LogitsNotFinite."""
        if not bool(torch.isfinite(logits.max())):
            raise LogitsNotFinite("the model's logits are not finite numbers")
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        return int(torch.multinomial(self.probabilities(logits).cpu(), 1, generator=self._generator))

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """What the draw is made from: float32 [vocabulary], adding up to 1. The temperature is not 0."""
        sampling = self._sampling
        # The largest first becomes 0, so that a tiny temperature makes no infinity of it.
        scaled = (logits.float() - logits.max()) / sampling.temperature
        if 0 < sampling.top_k < scaled.numel():
            smallest_kept = scaled.topk(sampling.top_k).values[-1]
            scaled = scaled.masked_fill(scaled < smallest_kept, -torch.inf)
        probabilities = torch.softmax(scaled, dim=-1)
        if sampling.top_p < 1:
            ordered, order = probabilities.sort(descending=True, stable=True)
            # A token stays when those before it do not reach top_p yet; so the first always does.
            dropped = order[ordered.cumsum(0) - ordered >= sampling.top_p]
            probabilities[dropped] = 0
            probabilities /= probabilities.sum()
        return probabilities
