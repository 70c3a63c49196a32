"""Has the libraries make their model over a lean base's tensors, for whatever runs models. Reads and copies nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gpu_service.engine.lean.model import LeanCausal
from gpu_service.engine.loading import shell
from gpu_service.engine.loading.work import Loaded, LoadRequest


def promote(request: LoadRequest, loaded: Loaded, base: LeanCausal) -> Any:
    """The library's model, prepared as one that it loaded; `loaded.config` is its config. Raises NotTensorForTensor."""
    # Where they lie now: the fast path may have moved them.
    plain = {name: base.get_parameter(name).data for name in base.plain_names}
    model = shell.build(request, loaded, replace(base.places, plain=plain))
    request.method.prepare_base(model)
    return model
