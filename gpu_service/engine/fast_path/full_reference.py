"""What every kernel of full training computes, in plain torch: what tests hold the kernels to, and what a CPU runs.

Sums and products are made in float32 and rounded once. Matrices may be views whose rows lie further apart than they are
wide. `adds`: what is in `out` stays, and is added to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class AdamSettings:
    """`weight_decay` is that of the elements at hand."""

    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float


@dataclass(frozen=True, kw_only=True)
class StepNumbers:
    """What a step of AdamW depends on: `learning_rate` on the host, else float32 on the device.

    `numbers` [4]: the step's size (the learning rate over 1 - beta1^step), one over the root of 1 - beta2^step, the
    factor of the gradient, and 1 where the step is made, 0 where it is left out.
    """

    learning_rate: float
    numbers: torch.Tensor


def weigh(gradient: torch.Tensor, rows: torch.Tensor, out: torch.Tensor, *, adds: bool) -> None:
    """`out` [N, K] becomes `gradient` [T, N] transposed times `rows` [T, K]: a linear layer's weights' gradient."""
    product = gradient.float().t() @ rows.float()
    out.copy_(out.float() + product if adds else product)


def sum_rows(gradient: torch.Tensor, out: torch.Tensor, *, adds: bool) -> None:
    """`out` [N] becomes the sum of the rows of `gradient` [T, N]: a bias' gradient."""
    total = gradient.sum(0, dtype=torch.float32)
    out.copy_(out.float() + total if adds else total)


def weigh_norm(
    gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, *, heads: int, adds: bool
) -> None:
    """`out` [D] becomes the gradient of the weight of an RMS norm of `heads` heads of D.

    `gradient` [T, heads * D] is that of what the norm gave, `x` what it was given, `scale` [T * heads] 1/rms.
    """
    normed = x.float().unflatten(1, (heads, -1)) * scale.view(-1, heads, 1)
    total = (gradient.float().unflatten(1, (heads, -1)) * normed).sum((0, 1))
    out.copy_(out.float() + total if adds else total)


def add_rows(gradient: torch.Tensor, tokens: torch.Tensor, out: torch.Tensor) -> None:
    """The rows of `out` [V, H] that `tokens` [T] name get those of `gradient` [T, H] added, equal ones summed first."""
    found, places = torch.unique(tokens, return_inverse=True)
    total = torch.zeros(len(found), gradient.shape[1], device=out.device)
    total.index_add_(0, places, gradient.float())
    out[found] = (out[found].float() + total).to(out.dtype)


def step_adamw(
    held: torch.Tensor,
    working: torch.Tensor | None,
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    step: StepNumbers,
    settings: AdamSettings,
) -> None:
    """A step of AdamW on flat buffers [P]: `held` float32, its moments `first` and `second` float32, and `working`,
    which becomes the new weights in its own type; None: there is no such copy.
    """
    size, inverse_root, factor, goes = step.numbers.unbind()
    wide = gradient.float() * factor
    new_first = first + (wide - first) * (1 - settings.beta1)
    new_second = second * settings.beta2 + wide * wide * (1 - settings.beta2)
    decayed = held * (1 - step.learning_rate * settings.weight_decay)
    new_held = decayed - size * new_first / (new_second.sqrt() * inverse_root + settings.epsilon)
    for buffer, value in ((held, new_held), (first, new_first), (second, new_second)):
        buffer.copy_(torch.where(goes > 0, value, buffer))
    if working is not None:
        working.copy_(held)
