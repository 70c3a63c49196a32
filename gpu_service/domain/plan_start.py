"""The checks of `plan.resolve` on what a job starts from and what it exports. Pure; reads no file.

Whether the earlier job's weights are whole is for whoever loads them; here it is whether they can fit at all.
"""

from collections.abc import Collection

from gpu_service.catalog import exports, methods
from gpu_service.catalog.methods.entry import MethodEntry
from gpu_service.domain.defaults import DEFAULT_LORA_RANK
from gpu_service.domain.errors import Refusal, refuse_user
from gpu_service.domain.spec import Lora, TrainingSpec

TRAIN, EXPORT = "train", "export"


def check_task(spec: TrainingSpec) -> bool:
    """Whether the job trains; else it only exports. Raises `Refusal` INVALID_FIELD."""
    if spec.task not in ("", TRAIN, EXPORT):
        raise refuse_user("INVALID_FIELD", f"the task is {spec.task!r}, but must be {TRAIN} or {EXPORT}", field="task")
    if spec.task != EXPORT:
        return True
    if spec.start_from is None or not spec.hyperparameters.exports:
        missing = "start_from" if spec.start_from is None else "hyperparameters.exports"
        raise refuse_user("INVALID_FIELD", f"an export needs {missing}", field=missing)
    return False


def check_exports(spec: TrainingSpec, method: MethodEntry) -> None:
    """Raises `Refusal` INVALID_FIELD, NOT_OFFERED (with the reason), COMBINATION_NOT_ALLOWED."""
    field = "hyperparameters.exports"
    for name in spec.hyperparameters.exports:
        entry = exports.REGISTRY.get(name)
        if entry is None:
            known = ", ".join(exports.REGISTRY)
            raise refuse_user("INVALID_FIELD", f"the catalog has no export {name!r}; it has {known}", field=field)
        if entry.not_offered:
            raise refuse_user(
                "NOT_OFFERED", f"export {name!r} is not offered: {entry.not_offered}", field=field, format=name
            )
        if not method.trains_adapter:
            raise refuse_user(
                "COMBINATION_NOT_ALLOWED",
                f"export {name!r} puts an adapter into its base; training type {method.id!r} leaves a whole model, in "
                "the artifact `model`",
                field=field,
            )


def check_start(
    spec: TrainingSpec, method: MethodEntry, *, covered: Collection[str], covered_before: Collection[str]
) -> None:
    """Whether the weights that the job starts from fit what it trains.

    `covered` are the linear layers that get an adapter, `covered_before` those of the earlier job. Raises `Refusal`
    COMBINATION_NOT_ALLOWED with both values.
    """
    start = spec.start_from
    if start is None or not start.training_type:
        return
    earlier = methods.find(start.training_type)
    if earlier is None or earlier.trains_adapter != method.trains_adapter:
        raise _does_not_fit(spec, "training_type", method.id, start.training_type)
    if not method.trains_adapter:
        return
    for field, now, before in zip(
        ("rank", "alpha"), _scale(spec.hyperparameters.lora), _scale(start.lora), strict=True
    ):
        if now != before:
            raise _does_not_fit(spec, f"hyperparameters.lora.{field}", f"{now:g}", f"{before:g}")
    if set(covered) != set(covered_before):
        raise _does_not_fit(spec, "hyperparameters.lora.target_modules", _in_words(covered), _in_words(covered_before))


def _in_words(covered: Collection[str]) -> str:
    """`q_proj, v_proj (32 layers)`."""
    names = ", ".join(sorted({path.rpartition(".")[2] for path in covered}))
    return f"{names} ({len(covered)} layers)"


def _scale(lora: Lora) -> tuple[int, float]:
    rank = DEFAULT_LORA_RANK if lora.rank is None else lora.rank
    return rank, 2.0 * rank if lora.alpha is None else lora.alpha


def _does_not_fit(spec: TrainingSpec, field: str, now: str, before: str) -> Refusal:
    assert spec.start_from is not None
    name = field.rpartition(".")[2]
    return refuse_user(
        "COMBINATION_NOT_ALLOWED",
        f"{name} is {now}, and {before} in job {spec.start_from.job_id}, whose {spec.start_from.name} this starts from",
        field=field,
        stage="ADAPTER",
        wanted=now,
        found=before,
    )
