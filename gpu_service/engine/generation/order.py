"""A generation as the server asked for it: the order that came down the pipe, and the request file that it names.

Needs no torch: the control thread makes orders while the libraries are still being imported. Decides nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_service.engine.request import DeviceChoice
from gpu_service.engine.stopping import StopSwitch


@dataclass(frozen=True, kw_only=True)
class GenerationOrder:
    """One `generate` from the pipe. `arrival_seconds` is on the monotonic clock; `switch` ends it at the next token."""

    id: str
    request_file: Path
    arrival_seconds: float
    switch: StopSwitch = field(default_factory=StopSwitch)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen, with nothing left to default. Temperature 0 takes the most likely one; top_k 0 is all."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """What a checkpoint's weights do not say of the adapter that they are."""

    rank: int
    alpha: float


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What is to be answered, and by what. `training_type` says how the base is held; catalog ids throughout.

    `adapter_directory` None: the base alone; `lora` is of one that has a checkpoint's weights. `chat_template` empty:
    the base's own.
    """

    device: DeviceChoice
    base_model: str
    model_directory: Path
    weights_digest: str
    model_type: str
    # Where the node keeps what makes loading faster; None: nowhere.
    cache_directory: Path | None
    training_type: str
    quantization: str
    double_quantization: bool
    compute_dtype: str
    adapter_directory: Path | None
    lora: LoraSettings
    chat_template: str
    # Each with `role` and `content`.
    messages: tuple[dict[str, str], ...]
    sampling: Sampling


def read(path: Path) -> GenerationRequest:
    """Read a request file. Raises OSError, ValueError (no JSON), KeyError, TypeError (not one of ours)."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    device, quantization, sampling = document["device"], document["quantization"], document["sampling"]
    adapter = document["adapter_directory"]
    return GenerationRequest(
        device=DeviceChoice(type=device["type"], index=int(device["index"])),
        base_model=document["base_model"],
        model_directory=Path(document["model_directory"]),
        weights_digest=document["weights_digest"],
        model_type=document["model_type"],
        cache_directory=Path(document["cache_directory"]) if document.get("cache_directory") else None,
        training_type=document["training_type"],
        quantization=quantization["method"],
        double_quantization=quantization["double_quantization"],
        compute_dtype=quantization["compute_dtype"],
        adapter_directory=None if adapter is None else Path(adapter),
        lora=LoraSettings(rank=document["lora"]["rank"], alpha=document["lora"]["alpha"]),
        chat_template=document["chat_template"],
        messages=tuple(document["messages"]),
        sampling=Sampling(**{**sampling, "stop": tuple(sampling["stop"])}),
    )
