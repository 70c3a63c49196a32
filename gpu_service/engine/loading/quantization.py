"""Stage QUANTIZATION: the linear layers of the base become quantized ones, on the run's device.

Where the plan names bitsandbytes, the mapped tensors of the stage before become the model here, through transformers
with a BitsAndBytesConfig: it quantizes each linear layer as it is placed. Where the plan names this engine's own
quantizer, the layers hold their weights already. Without quantization there is nothing to do.
"""

from __future__ import annotations

from gpu_service.domain.quantizer import LIBRARY, OWN
from gpu_service.engine.loading.building import build_base
from gpu_service.engine.loading.work import Loaded, LoadRequest, Progress

# transformers raises ImportError or RuntimeError when a backend is missing, ValueError for options or tensors that do
# not go together; bitsandbytes RuntimeError and NotImplementedError for what a device cannot do; torch AssertionError
# when it was built without the device.
RAISES: tuple[type[Exception], ...] = (
    ImportError,
    RuntimeError,
    ValueError,
    NotImplementedError,
    AssertionError,
    KeyError,
    TypeError,
)


def run(request: LoadRequest, loaded: Loaded, progress: Progress) -> dict[str, str]:
    """Make `loaded.base` when the base is quantized."""
    details = {"quantization": request.plan.resolved.quantization.method}
    if request.has_resident:
        return details | {"resident": "true"}
    if not request.quantization.IS_QUANTIZED:
        return details
    settings = request.plan.resolved.quantization
    if loaded.base is None:
        loaded.base = build_base(
            request,
            loaded,
            request.quantization.build_config(
                double_quantization=settings.double_quantization, compute_dtype=request.compute_dtype
            ),
            progress,
        )
        details["quantizer"] = LIBRARY
    else:
        # Quantized as it was read, or read as it was quantized before.
        details["quantizer"] = OWN
    request.method.prepare_base(loaded.base)
    return details | {
        "model_class": type(loaded.base).__name__,
        "config_class": type(loaded.base.config).__name__,
        "quantized_linears": str(request.quantization.count_quantized(loaded.base)),
        "bytes": str(sum(tensor.nbytes for tensor in (*loaded.base.parameters(), *loaded.base.buffers()))),
    }
