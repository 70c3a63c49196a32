"""Loading a model in five named stages; see `stages` for the table and docs/model-loading.md for why."""

from gpu_service.engine.loading.stages import BASE_STAGES, STAGES, load, report_unforeseen_failure
from gpu_service.engine.loading.work import Loaded, LoadRequest

__all__ = ["BASE_STAGES", "STAGES", "LoadRequest", "Loaded", "load", "report_unforeseen_failure"]
