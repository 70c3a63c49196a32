"""Stage ADAPTER: what is trained is put onto the base, and covers as many layers as the plan said.

For a full training the base itself is what is trained. A job that starts from an earlier one gets its weights here.
"""

from __future__ import annotations

import torch
from safetensors import SafetensorError

from gpu_service.engine.durable import DamagedDirectory
from gpu_service.engine.loading import starting
from gpu_service.engine.loading.work import Loaded, LoadRequest, Progress

# PEFT raises ValueError for targets that match nothing or options that do not go together, TypeError and KeyError for
# those it does not know, ImportError for a missing backend, and RuntimeError from torch when layers are made. What an
# earlier job left may be missing (OSError), no safetensors, or not what its manifest says.
RAISES: tuple[type[Exception], ...] = (
    ValueError,
    TypeError,
    KeyError,
    ImportError,
    RuntimeError,
    NotImplementedError,
    OSError,
    SafetensorError,
    DamagedDirectory,
)


class CoverageMismatch(ValueError):
    """The adapter covers another number of layers than the plan said."""


def run(request: LoadRequest, loaded: Loaded, progress: Progress) -> dict[str, str]:
    """Make `loaded.model` and count its layers. The adapter's first weights follow from the seed alone."""
    progress(0, 1, "adapters")
    resolved = request.plan.resolved
    # The generator is set here, so that the first weights do not depend on what was loaded before.
    torch.manual_seed(resolved.seed)
    loaded.model = request.method.attach(loaded.base, request.base_model, resolved)
    loaded.num_covered_linears = request.method.count_covered(loaded.model)
    if loaded.num_covered_linears != request.plan.num_covered_linears:
        raise CoverageMismatch(
            f"{loaded.num_covered_linears} linear layers are covered; the plan says {request.plan.num_covered_linears}"
        )
    started = {} if request.start is None else starting.put(request.start, loaded, request.pace)
    progress(1, 1, "adapters")
    trainable = sum(parameter.numel() for parameter in loaded.model.parameters() if parameter.requires_grad)
    details = {"covered_linears": str(loaded.num_covered_linears), "trainable_parameters": str(trainable)}
    return details | started
