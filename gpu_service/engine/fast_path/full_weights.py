"""Every weight of a model in one flat buffer, of which the model's own parameters are views: what full training steps.

So one launch is an optimizer's step, and whatever writes the parameters (a checkpoint) writes the buffer. Layers that
read the same rows lie end to end, and are one matrix of a product. Products take a copy in the compute type, or the
buffer itself where it is held in that. Matrices come first, then norms and biases, to which weight decay does not
apply. Refuses a model with any parameter that it has no place for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

# What is one region begins at a multiple of this: a block of moments in 8 bits has weights of one region alone.
REGION_ALIGNMENT = 256


class WeightsNotSupported(ValueError):
    """What is trained is not what the fast path trains."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """A tensor's place in every flat buffer of a model."""

    start: int
    shape: torch.Size

    @property
    def stop(self) -> int:
        return self.start + self.shape.numel()

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.start : self.stop].view(self.shape)


class FlatWeights:
    """`held` is what is trained, `working` the same in the compute type: one buffer where the types are one."""

    def __init__(
        self, causal: Any, groups: Sequence[Sequence[Any]], *, device: torch.device, compute_dtype: torch.dtype
    ) -> None:
        """`groups` are linear layers that read the same rows. The model's parameters are views of `held` afterwards.

        Raises WeightsNotSupported.
        """
        named = dict(causal.named_parameters())
        dtypes = {parameter.dtype for parameter in named.values()}
        if len(dtypes) != 1 or not all(parameter.requires_grad for parameter in named.values()):
            raise WeightsNotSupported("all weights are trained, and held in one type")
        self._parameters = list(named.values())
        names = {id(parameter): name for name, parameter in named.items()}
        runs = [*_matrices(causal, groups), *_vectors(causal, groups)]
        order = [parameter for run in runs for parameter in run]
        placed = {id(parameter) for parameter in order}
        missing = sorted(name for identity, name in names.items() if identity not in placed)
        if missing:
            raise WeightsNotSupported(f"{', '.join(missing[:3])} are trained, which this path does not")
        self._regions: dict[int, Region] = {}
        size = self.num_matrix_elements = 0
        for run in runs:
            size = -(-size // REGION_ALIGNMENT) * REGION_ALIGNMENT
            if run[0].ndim == 1 and not self.num_matrix_elements:
                self.num_matrix_elements = size
            for parameter in run:
                self._regions[id(parameter)] = Region(start=size, shape=parameter.shape)
                size += parameter.numel()
        self.held = torch.zeros(size, device=device, dtype=dtypes.pop())
        for parameter in order:
            place = self.region(parameter).view(self.held)
            place.copy_(parameter.data)
            # One by one, so that what was there goes before the next one is copied.
            parameter.data = place
        is_copied = self.held.dtype is not compute_dtype
        self.working = torch.empty(size, device=device, dtype=compute_dtype) if is_copied else self.held
        self._seen: tuple[int, ...] = ()
        self.refresh()

    def region(self, parameter: torch.Tensor) -> Region:
        return self._regions[id(parameter)]

    def joined(self, parameters: Sequence[torch.Tensor]) -> Region:
        """Matrices [N, K] that lie end to end as one, or vectors [N]. Raises WeightsNotSupported where they do not."""
        regions = [self.region(parameter) for parameter in parameters]
        if any(before.stop != after.start for before, after in pairwise(regions)):
            raise WeightsNotSupported("weights of layers that read the same rows do not lie end to end")
        rows = sum(region.shape[0] for region in regions)
        return Region(start=regions[0].start, shape=torch.Size((rows, *regions[0].shape[1:])))

    def refresh(self) -> None:
        """Make the working copy anew if the model's parameters were written to. The optimizer writes both by itself."""
        seen = tuple(parameter._version for parameter in self._parameters)
        if self.working is not self.held and seen != self._seen:
            self.working.copy_(self.held)
        self._seen = seen

    @property
    def counts(self) -> tuple[int, int]:
        """How many of `views` are matrices, and how many are not."""
        num_matrices = sum(parameter.ndim >= 2 for parameter in self._parameters)
        return num_matrices, len(self._parameters) - num_matrices

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """A flat buffer as one view a parameter: matrices, then the rest, each in the order of the model's own."""
        # As `builders.optimizers.parameter_groups` numbers them.
        order = sorted(self._parameters, key=lambda parameter: parameter.ndim < 2)
        return [self.region(parameter).view(flat) for parameter in order]


def _matrices(causal: Any, groups: Sequence[Sequence[Any]]) -> list[list[torch.Tensor]]:
    """In runs that lie end to end, each once: embedding and head may be one."""
    tables = [[causal.model.embed_tokens.weight]]
    if causal.lm_head.weight is not tables[0][0]:
        tables.append([causal.lm_head.weight])
    return [*tables, *([layer.weight for layer in group] for group in groups)]


def _vectors(causal: Any, groups: Sequence[Sequence[Any]]) -> list[list[torch.Tensor]]:
    biases = [[layer.bias for layer in group if layer.bias is not None] for group in groups]
    norms = [causal.model.norm.weight]
    for layer in causal.model.layers:
        norms += [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
        norms += [norm.weight for norm in head_norms(layer) if norm is not None]
    return [*(run for run in biases if run), *([norm] for norm in norms)]


def head_norms(layer: Any) -> tuple[Any, Any]:
    """The norms of queries and keys, where the family has them; else None."""
    return getattr(layer.self_attn, "q_norm", None), getattr(layer.self_attn, "k_norm", None)
