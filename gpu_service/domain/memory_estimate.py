"""Predicted device memory of a run, by arithmetic on shapes. Measures nothing and refuses nothing.

`peak_bytes` is the highest memory that torch's allocator hands out (`max_memory_allocated`), as the STEP and
MEMORY_MEASURED events tell it; what the driver, its libraries and the allocator's gaps take beside it is
`overhead_bytes`, and the sum is what a device must have. A CPU has one number for both: the process' resident memory,
of which the holes in the C library's heap are a large part.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gpu_service.catalog.base_models import BaseModel, LinearLayer
from gpu_service.catalog.optimizers.entry import OptimizerEntry
from gpu_service.catalog.quantization.entry import QuantizationEntry
from gpu_service.domain import memory_activations, memory_fast_path
from gpu_service.domain.defaults import FP8, LOW, RESIDENT, ResolvedHyperparameters
from gpu_service.domain.device import Device
from gpu_service.domain.memory_activations import Precision, StepShape
from gpu_service.domain.memory_calibration import ANALYTIC, UNCALIBRATED, Calibration
from gpu_service.domain.memory_passes import LargestPasses
from gpu_service.domain.recomputation import NOTHING, everything
from gpu_service.domain.trainer import adds_up_passes

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_TRAINED_BYTES = 4  # trained weights and their gradients are float32
# The driver's context with the kernels of torch and its libraries: 0.82 GiB on an H100.
_CUDA_CONTEXT_BYTES = 850 * 1024**2
# An engine's process on a CPU beside its model: what was imported, and what the libraries make for their first steps.
_CPU_PROCESS_BYTES = 540 * 1024**2
# What the libraries of a build of torch for CUDA add to that: they are relocated when they are loaded, used or not.
# (`benchmarks/memory_cpu_cuda_build.json`.)
_CUDA_LIBRARIES_BYTES = 350 * 1024**2
# Two codes, and two float32 scales for every 256 parameters.
_LOW_STATE_BYTES = 2 + 2 * 4 / 256
# Gaps between blocks, and room for a prediction that is a little low.
_MARGIN = 20
# Codes, offsets and rounding of a quantized layer.
_LAYER_EXTRA_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes; `activations_bytes` is all that a step takes for a time, at its highest moment.

    `analytic_bytes` is the peak before this node's measurements were taken into account; `basis` says whether they
    were.
    """

    weights_bytes: int
    adapter_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    overhead_bytes: int
    analytic_bytes: int
    # Of `overhead_bytes`, what is there before there is a model.
    process_bytes: int
    # Beside all of it, locked memory of the host; 0 where nothing is offloaded.
    host_bytes: int = 0
    is_cpu: bool = False
    basis: str = ANALYTIC

    @property
    def total_bytes(self) -> int:
        """What a device must have."""
        states = self.weights_bytes + self.adapter_bytes + self.gradients_bytes + self.optimizer_bytes
        return states + self.activations_bytes + self.overhead_bytes

    @property
    def peak_bytes(self) -> int:
        """What a run's measured peak is to be compared with."""
        return self.total_bytes if self.is_cpu else self.total_bytes - self.overhead_bytes

    @property
    def standing_bytes(self) -> int:
        """What is needed however short the data is: no activations, and no margin for them."""
        return self.total_bytes - self.activations_bytes - self.overhead_bytes + self.process_bytes

    def to_json(self) -> dict[str, str]:
        """`MemoryEstimate` as proto JSON."""
        numbers = ("weights", "adapter", "gradients", "optimizer", "activations", "overhead", "total", "peak", "host")
        return {
            **{f"{name}_bytes": str(getattr(self, f"{name}_bytes")) for name in numbers},
            "analytic_bytes": str(self.analytic_bytes),
            "basis": self.basis,
        }


def estimate_memory(
    base: BaseModel,
    resolved: ResolvedHyperparameters,
    quantization: QuantizationEntry,
    optimizer: OptimizerEntry,
    *,
    covered_layers: Sequence[LinearLayer],
    num_trainable_parameters: int,
    passes: LargestPasses,
    device: Device,
    calibration: Calibration = UNCALIBRATED,
) -> MemoryEstimate:
    """`passes` are the largest that the plan has, or may have; `calibration` is what this node measured of its like."""
    trains_adapter = resolved.lora is not None
    compute_bytes = DTYPE_BYTES[resolved.quantization.compute_dtype]
    is_quantized = quantization.bits is not None
    # PEFT holds what is not quantized of a quantized base in float32, and a base that is trained is float32 anyway.
    # The fast path holds it as it multiplies by it.
    takes_fast_path = resolved.trainer == "fast"
    held_bytes = compute_bytes if trains_adapter and (takes_fast_path or not is_quantized) else _TRAINED_BYTES
    is_low = resolved.full_memory == LOW
    if is_low:
        held_bytes = compute_bytes
    trained = _TRAINED_BYTES * num_trainable_parameters
    gradients = trained
    if is_low:
        gradients = compute_bytes * _gradients_at_a_time(base)
    elif takes_fast_path and not trains_adapter and not adds_up_passes(**vars(resolved.batch)):
        gradients = compute_bytes * num_trainable_parameters
    state_bytes = _LOW_STATE_BYTES if is_low else optimizer.state_bytes_per_parameter
    shape = StepShape(
        base=base,
        precision=Precision(
            compute_bytes=compute_bytes,
            residual_bytes=held_bytes,
            trains_base=not trains_adapter,
            is_quantized=is_quantized,
            keeps_inputs=is_quantized and quantization.block_size is None,
        ),
        covered=tuple(covered_layers),
        rank=resolved.lora.rank if resolved.lora is not None else 0,
        num_trainable_parameters=num_trainable_parameters,
        recomputes=resolved.gradient_checkpointing,
        has_dropout=resolved.lora is not None and resolved.lora.dropout > 0,
        step_bytes_per_parameter=optimizer.step_bytes_per_parameter,
        device_type=device.type,
        recomputation=resolved.recomputation
        or (everything(base.num_layers) if resolved.gradient_checkpointing else NOTHING),
        keeps_weights=takes_fast_path and is_quantized and resolved.base_weights == RESIDENT,
        rounds_rows=resolved.compute == FP8,
        gradient_bytes=gradients,
        goes_back_twice=is_low,
    )
    beside = (memory_fast_path if takes_fast_path else memory_activations).peak_beside_state(shape, passes)
    # What the fast path's references take on a CPU, for tests, nobody plans to the byte.
    holes = 0 if takes_fast_path else memory_activations.heap_holes(shape, passes)
    weights = _weights_bytes(base, resolved, quantization, held_bytes)
    if shape.keeps_weights:
        weights += compute_bytes * base.num_linear_parameters
    if takes_fast_path and not trains_adapter and compute_bytes != held_bytes:
        # Products take a copy.
        weights += compute_bytes * base.num_parameters
    is_cpu = device.type == "cpu"
    process_bytes = _process_bytes(device)
    estimate = MemoryEstimate(
        weights_bytes=weights,
        adapter_bytes=trained if trains_adapter else 0,
        gradients_bytes=gradients,
        optimizer_bytes=0 if optimizer.is_paged else math.ceil(state_bytes * num_trainable_parameters),
        activations_bytes=max(beside - gradients, 0),
        overhead_bytes=process_bytes + holes if is_cpu else process_bytes,
        analytic_bytes=0,
        host_bytes=memory_fast_path.host_bytes(shape, passes) if takes_fast_path else 0,
        process_bytes=process_bytes,
        is_cpu=is_cpu,
    )
    estimate = replace(estimate, analytic_bytes=estimate.peak_bytes)
    peak_bytes = calibration.scale(estimate.peak_bytes)
    if peak_bytes is not None:
        # Weights and states are known to the byte: what was measured otherwise is the activations' doing.
        others = estimate.peak_bytes - estimate.activations_bytes
        estimate = replace(estimate, activations_bytes=max(peak_bytes - others, 0), basis=calibration.basis)
    if is_cpu:
        return estimate
    return replace(estimate, overhead_bytes=process_bytes + estimate.peak_bytes // _MARGIN)


def _process_bytes(device: Device) -> int:
    if device.type != "cpu":
        return _CUDA_CONTEXT_BYTES
    return _CPU_PROCESS_BYTES + (_CUDA_LIBRARIES_BYTES if device.has_cuda_build else 0)


def _gradients_at_a_time(base: BaseModel) -> int:
    """Elements where none is kept: the table that is embedding and head, and a block's down projection."""
    return base.hidden_size * (base.vocabulary_size + base.intermediate_size)


def _weights_bytes(
    base: BaseModel, resolved: ResolvedHyperparameters, quantization: QuantizationEntry, held_bytes: int
) -> int:
    linear = base.num_linear_parameters
    plain = (base.num_parameters - linear) * held_bytes
    if quantization.bits is None:
        return plain + linear * held_bytes
    packed = linear * quantization.bits // 8 + _LAYER_EXTRA_BYTES * len(base.linear_layers)
    if quantization.block_size is None:  # one float32 scale a row
        return plain + packed + 4 * sum(layer.out_features for layer in base.linear_layers)
    scales = linear // quantization.block_size
    # A scale is float32, or one byte and a float32 for every 256 scales when the scales are quantized too.
    return plain + packed + (scales + scales // 64 if resolved.quantization.double_quantization else 4 * scales)
