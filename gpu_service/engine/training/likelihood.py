"""The forward pass: what each sequence of a flat batch costs under a model. Decides no objective and takes no mean."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from gpu_service.engine.training.batches import MicroBatch


def nats_by_sequence(model: Any, batch: MicroBatch) -> torch.Tensor:
    """Negative log likelihood of each sequence's targets: float64 [S], with gradient where gradients are on.

    `model` is inside `attending_within_sequences`. Logits are made only where a target follows, in float32.
    """
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
