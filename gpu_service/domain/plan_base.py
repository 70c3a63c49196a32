"""How a training holds its base, and whether it can: method, quantization, family and device against each other.

A part of `plan.resolve`, and all that an answer without training needs. Looks at no data and counts no bytes.
"""

from collections.abc import Mapping

from gpu_service.catalog import families, methods, quantization
from gpu_service.catalog.base_models import BaseModel
from gpu_service.catalog.families.entry import FamilyEntry
from gpu_service.catalog.methods.entry import MethodEntry
from gpu_service.catalog.quantization.entry import QuantizationEntry
from gpu_service.domain.checked_plan import HeldBase
from gpu_service.domain.defaults import check_ranges, resolve_quantization
from gpu_service.domain.device import Device
from gpu_service.domain.errors import Fault, Refusal, refuse_user
from gpu_service.domain.spec import Hyperparameters, TrainingSpec


def resolve_base(
    spec: TrainingSpec, base_model: BaseModel, device: Device, versions: Mapping[str, str] | None = None
) -> HeldBase:
    """How a training by this spec would hold its base; data, mix and everything else of the spec are not looked at.

    Raises `Refusal` as `resolve` does for model, training type, quantization and device.
    """
    given = spec.hyperparameters
    if base_model.problem:
        raise refuse_user("MODEL_INVALID", base_model.problem, field="base_model", stage="CONFIG")
    check_ranges(given)
    method = find_method(spec)
    quantized = find_quantization(given, method)
    check_device(given, quantized, device, versions or {})
    return HeldBase(
        base_model=base_model,
        family=find_family(spec, base_model),
        method=method,
        quantization=resolve_quantization(given, quantized, device),
    )


def find_method(spec: TrainingSpec) -> MethodEntry:
    """The training type. Raises `Refusal` TRAINING_TYPE_UNKNOWN."""
    method = methods.find(spec.training_type)
    if method is None:
        known = ", ".join(methods.REGISTRY)
        raise refuse_user(
            "TRAINING_TYPE_UNKNOWN",
            f"the catalog has no training type {spec.training_type!r}; it has {known}",
            field="training_type",
        )
    return method


def find_quantization(given: Hyperparameters, method: MethodEntry) -> QuantizationEntry:
    """How linear layers are held. Raises `Refusal` QUANTIZATION_UNKNOWN, COMBINATION_NOT_ALLOWED."""
    field = "hyperparameters.quantization.method"
    name = given.quantization.method or method.quantizations[0]
    entry = quantization.REGISTRY.get(name)
    if entry is None:
        known = ", ".join(quantization.REGISTRY)
        raise refuse_user(
            "QUANTIZATION_UNKNOWN",
            f"the catalog has no quantization {name!r}; it has {known}",
            field=field,
            stage="QUANTIZATION",
        )
    if name not in method.quantizations:
        raise refuse_user(
            "COMBINATION_NOT_ALLOWED",
            f"training type {method.id!r} does not go with quantization {name!r}; it goes with "
            + ", ".join(method.quantizations),
            field=field,
            stage="QUANTIZATION",
            allowed=",".join(method.quantizations),
        )
    if given.quantization.double_quantization and not entry.supports_double_quantization:
        raise refuse_user(
            "COMBINATION_NOT_ALLOWED",
            f"quantization {name!r} has no block scales to quantize again",
            field="hyperparameters.quantization.double_quantization",
            stage="QUANTIZATION",
        )
    return entry


def find_family(spec: TrainingSpec, base_model: BaseModel) -> FamilyEntry:
    """Whose classes the model is built with. Raises `Refusal` MODEL_TYPE_UNKNOWN, MODEL_TYPE_MISMATCH."""
    config_type = base_model.config_type
    if not spec.model_type:
        for entry in families.REGISTRY.values():
            if config_type in entry.config_types:
                return entry
        raise refuse_user(
            "MODEL_TYPE_UNKNOWN",
            f"no model type of the catalog accepts config type {config_type!r}; name one of "
            + ", ".join(families.REGISTRY),
            field="model_type",
            stage="CONFIG",
            config_type=config_type,
        )
    family = families.REGISTRY.get(spec.model_type)
    if family is None:
        raise refuse_user(
            "MODEL_TYPE_UNKNOWN",
            f"the catalog has no model type {spec.model_type!r}; it has {', '.join(families.REGISTRY)}",
            field="model_type",
            stage="CONFIG",
        )
    # A config that names no type is built by the family's own config class.
    if config_type and config_type not in family.config_types:
        raise refuse_user(
            "MODEL_TYPE_MISMATCH",
            f"the project says model type {family.id!r}, which accepts {', '.join(family.config_types)}, and the "
            f"model's config.json says {config_type!r}",
            field="model_type",
            stage="CONFIG",
            model_type=family.id,
            config_type=config_type,
        )
    return family


def check_device(
    given: Hyperparameters, quantized: QuantizationEntry, device: Device, versions: Mapping[str, str]
) -> None:
    if device.type not in quantized.devices:
        raise unsupported(f"{device.name} cannot do quantization {quantized.id!r}", "quantization.method")
    missing = [name for name in quantized.requires if versions and name not in versions]
    if missing:
        raise unsupported(f"quantization {quantized.id!r} needs {missing[0]}, which is not here", "quantization.method")
    wanted = given.quantization.compute_dtype
    if wanted == "float16" and device.type == "cpu":
        raise unsupported("a CPU does not train in float16", "quantization.compute_dtype")
    if wanted == "bfloat16" and device.type == "cuda" and not device.has_bfloat16:
        raise unsupported(
            f"{device.name} (compute capability {device.compute_capability}) has no bfloat16",
            "quantization.compute_dtype",
        )


def unsupported(message: str, field: str, *, stage: str = "QUANTIZATION") -> Refusal:
    return Refusal("DEVICE_UNSUPPORTED", Fault.USER, message, stage, f"hyperparameters.{field}")
