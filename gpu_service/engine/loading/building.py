"""Makes the base model from a config object and tensors, through the model class' own `from_pretrained`.

transformers takes `config` and `state_dict` instead of a path; renaming, tying, placing and quantizing tensors stay its
work and that of bitsandbytes. Its documented tqdm hook tells how many tensors are done. Refuses to let a missing tensor
become a random one. Patches nothing and never assigns to the config.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gpu_service.engine.loading.work import Loaded, LoadRequest, Progress

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

_WEIGHT_BAR = "Loading weights"
_MAX_REPORT_CHARACTERS = 4000


class IncompleteWeights(ValueError):
    """The files lack tensors that the model needs."""


def build_base(
    request: LoadRequest, loaded: Loaded, quantization_config: BitsAndBytesConfig | None, progress: Progress
) -> Any:
    """The base model on its device; `loaded.tensors` is dropped.

    Raises what from_pretrained raises, IncompleteWeights.
    """
    tensors, loaded.tensors = loaded.tensors, None
    model, report = from_tensors(
        request,
        loaded,
        loaded.config,
        tensors,
        device=str(request.device),
        quantization_config=quantization_config,
        progress=progress,
    )
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise IncompleteWeights(f"the weight files lack {', '.join(missing[:5])}{more}")
    return model


def _unheard(done: int, total: int, unit: str) -> None:
    """Progress that nobody hears of."""


def from_tensors(
    request: LoadRequest,
    loaded: Loaded,
    config: Any,
    tensors: Any,
    *,
    device: str,
    quantization_config: BitsAndBytesConfig | None = None,
    progress: Progress = _unheard,
) -> tuple[Any, dict[str, Any]]:
    """The model class' model of `config` and `tensors` by name, and its report of keys. Raises what it raises."""
    with _tensor_progress(progress), _library_report(loaded):
        model, report = request.family.MODEL_CLASS.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=request.method.base_dtype(request.compute_dtype),
            device_map={"": device},
            quantization_config=quantization_config,
            use_safetensors=True,
            output_loading_info=True,
        )
    return model, report


class _CountedTensors:
    """Stands in for the library's progress bar over the tensors that it places."""

    def __init__(self, items: Iterable[Any], progress: Progress) -> None:
        self._items = list(items)
        self._progress = progress

    def __iter__(self) -> Iterator[Any]:
        for index, item in enumerate(self._items):
            self._progress(index, len(self._items), "tensors")
            yield item
        self._progress(len(self._items), len(self._items), "tensors")


@contextmanager
def _tensor_progress(progress: Progress) -> Iterator[None]:
    def choose(factory: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if options.get("desc") == _WEIGHT_BAR:
            return _CountedTensors(arguments[0], progress)
        return factory(*arguments, **options)

    # Not imported where the fast path makes the model: it takes seconds.
    from transformers.utils import logging as transformers_logging

    previous = transformers_logging.set_tqdm_hook(choose)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


class _ReportKeeper(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"


@contextmanager
def _library_report(loaded: Loaded) -> Iterator[None]:
    """Keep what transformers logs while it loads:

    its RuntimeError says `see the above report`, and that is where it is.
    """
    keeper = _ReportKeeper()
    logger = logging.getLogger("transformers")
    logger.addHandler(keeper)
    try:
        yield
    finally:
        logger.removeHandler(keeper)
        if keeper.text:
            loaded.failure_details["library_report"] = keeper.text[:_MAX_REPORT_CHARACTERS]
