"""What goes into the loading stages and what comes out: values only, no behavior but for progress.

Each stage reads what earlier ones made and adds its own part. The config is a config object from the first stage on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any, Protocol

import torch

from gpu_service.engine.pace import NOBODY, Pace
from gpu_service.engine.request import StartPoint
from tunesmith.common.v1 import plan_pb2

# Called with what is done, of what, in which unit; raises StopRequested once a stop was asked for.
Progress = Callable[[int, int, str], None]


class KeptTokenizers(Protocol):
    """Tokenizers that outlive a run."""

    def find(self, model_directory: Path) -> Any | None:
        """As it was read; None when it is not there, or its files have changed since."""
        ...

    def put(self, model_directory: Path, tokenizer: Any) -> None: ...


@dataclass(frozen=True, kw_only=True)
class BaseKey:
    """Two runs with equal keys train on the same base, bit for bit."""

    weights_digest: str
    # SHA-256 of config.json: the same weights under another rotary base or norm are another model.
    config_digest: str
    model_directory: Path
    quantization: str
    double_quantization: bool
    compute_dtype: str
    base_dtype: str
    device: str


@dataclass(kw_only=True)
class HeldBase:
    """A base that is on the device. Nothing else refers to it while it is loaded from: whoever makes another model of
    its tensors puts that in its place, so that a tensor which is replaced is gone, and who has no use for it None.
    """

    model: Any | None


@dataclass(frozen=True, kw_only=True)
class LoadRequest:
    """What is to be loaded, by builders that the catalog named.

    `resident` is the base that is on the device already, or None; then nothing of it is read again.
    """

    model_directory: Path
    base_model: str
    # Lower-case hex; empty when the job is pinned to none.
    weights_digest: str
    plan: plan_pb2.Plan
    family: ModuleType
    quantization: ModuleType
    method: ModuleType
    compute_dtype: torch.dtype
    device: torch.device
    # Where the node keeps what makes loading faster the next time; None: nothing is kept.
    cache_directory: Path | None = None
    # Who quantizes, by the plan: `own` or `bitsandbytes`; empty where nothing is quantized.
    quantizer: str = ""
    resident: HeldBase | None = None
    # What an earlier job left, to begin with; None: the base as it is.
    start: StartPoint | None = None
    # Hears of work on a big file, beside the progress that is reported.
    pace: Pace = NOBODY
    # The fast path's own model, made without the libraries; the builders are `lean.builders` then.
    is_lean: bool = False
    # Has the tokenizer that was read last, and takes the one that is read.
    tokenizers: KeptTokenizers | None = None

    @property
    def has_resident(self) -> bool:
        """Whether the base on the device serves this load, as far as is known by now."""
        return self.resident is not None and self.resident.model is not None


@dataclass(kw_only=True)
class Loaded:
    """What the stages have made so far. After the last one nothing is None but `tensors`."""

    # Every weight by its name in the files; dropped once the model holds them.
    tensors: dict[str, torch.Tensor] | None = None
    # Type that most weights have in the files, which a full model is saved in.
    stored_dtype: torch.dtype | None = None
    config: Any = None
    tokenizer: Any = None
    # Reads it, where nothing needed it when the model was loaded. Raises LoadFailure.
    read_tokenizer: Callable[[], Any] | None = None
    # In place of the tokenizer's own, where the plan names one.
    chat_template: str | None = None
    # The base as transformers made it.
    base: Any = None
    # What is trained: the base itself, or a PEFT model around it (or the fast path's, which looks like one).
    model: Any = None
    # Adapter layers, 0 when the base itself is trained.
    num_covered_linears: int = 0
    # File in hand, relative to the model directory; part of a failure.
    file: str = ""
    # Anything that belongs into a failure's details, by name.
    failure_details: dict[str, str] = field(default_factory=dict)
    # Seconds by what they went into, where this engine's own reader loaded; for measurements.
    timings: dict[str, float] = field(default_factory=dict)
    # The thread that writes a 4-bit copy of the base for the next time, while it does.
    copying: Thread | None = None

    def need_tokenizer(self) -> Any:
        """The tokenizer, with the plan's template; read now if nothing needed it before. Raises LoadFailure."""
        if self.tokenizer is None and self.read_tokenizer is not None:
            self.tokenizer = self.read_tokenizer()
        if self.chat_template is not None:
            self.tokenizer.chat_template = self.chat_template
        return self.tokenizer
