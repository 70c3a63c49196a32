"""Which runs the fast path's own model serves, from the plan, the run and the model's headers. Loads nothing.

What needs a forward pass of the library's model (samples, exports), or begins with an earlier job's tensors, does not.
"""

from __future__ import annotations

import logging

from gpu_service.domain.plan_start import EXPORT
from gpu_service.domain.trainer import FAST
from gpu_service.engine.lean import method
from gpu_service.engine.lean.builders import FAMILY, QUANTIZATIONS, Builders
from gpu_service.engine.lean.config import LeanConfig
from gpu_service.engine.loading import direct, places, weights
from gpu_service.engine.loading.work import LoadRequest
from gpu_service.engine.reading.stored import read_header
from gpu_service.engine.request import RunRequest
from tunesmith.common.v1 import plan_pb2

_LOG = logging.getLogger(__name__)


def is_lean(request: RunRequest, plan: plan_pb2.Plan) -> bool:
    """Whether the run wants nothing but what a lean model has."""
    settings = plan.resolved
    return (
        request.spec.task != EXPORT
        and settings.trainer == FAST
        and settings.HasField("lora")
        and settings.quantization.method in QUANTIZATIONS
        and not settings.exports
        and not request.spec.sample_prompts
        and request.start is None
    )


def fits(request: LoadRequest) -> bool:
    """Whether the engine's own reader can make the lean model of these files, tensor for tensor.

    Of a base that is there already, whoever made it, only the config has to be one that is read here.
    """
    try:
        config = LeanConfig.read(request.model_directory)
        if request.resident is not None:
            return True
        if not direct.is_wanted(request):
            return False
        files = [request.model_directory / name for name in weights.list_shards(request.model_directory)]
        stored = {tensor.name: tensor for file in files for tensor in read_header(file)[1]}
        places.lay_out(request, config, stored)
    except (OSError, ValueError, KeyError) as error:
        # What is wrong with a model is for the loading stages to say.
        _LOG.info("the libraries make this model: %s", error)
        return False
    return True


def builders(plan: plan_pb2.Plan) -> Builders:
    """What a lean load has in place of the catalog's."""
    return Builders(family=FAMILY, quantization=QUANTIZATIONS[plan.resolved.quantization.method], method=method)
