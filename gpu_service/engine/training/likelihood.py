"""The forward pass: what each sequence of a flat batch costs under a model. Decides no objective and takes no mean."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch.nn import functional

from gpu_service.engine.training.batches import MicroBatch


@runtime_checkable
class MeasuresNats(Protocol):
    """A model that says by itself what sequences cost, without logits."""

    def nats_by_sequence(self, batch: MicroBatch) -> torch.Tensor:
        """Negative log likelihood of each sequence's targets: float64 [S], with gradient where gradients are on."""
        ...


def nats_by_sequence(model: Any, batch: MicroBatch) -> torch.Tensor:
    """Negative log likelihood of each sequence's targets: float64 [S], with gradient where gradients are on.

    `model` is inside `attending_within_sequences`. Logits are made only where a target follows, in float32. A model of
    the fast path has a way of its own.
    """
    if isinstance(model, MeasuresNats):
        return model.nats_by_sequence(batch)
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        logits_to_keep=batch.target_positions,
        use_cache=False,
        flat_layout=batch.layout,
    )
    nats = functional.cross_entropy(output.logits[0].float(), batch.labels, reduction="none")
    # Sums in an order that is always the same: adding by index is not, on a GPU.
    return torch.stack([part.sum() for part in nats.double().split(list(batch.targets_by_sequence))])
