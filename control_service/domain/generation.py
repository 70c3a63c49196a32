"""Answers of what jobs trained: what is asked, and the parts that come back. Chooses no node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from control_service.domain.artifact import FileReference

# What a node needs of an adapter's directory; tokenizer and model card are for people.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# And of a checkpoint of an adapter.
CHECKPOINT_FILES = ("weights.safetensors",)


@dataclass(frozen=True, kw_only=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class GenerationSource:
    """What answers: a job's adapter, with `base_only` the base of a job, or a base model by name. One name is set."""

    job_id: str = ""
    base_model: str = ""
    base_only: bool = False


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What a node is asked. Empty texts mean what they mean in `tunesmith.gpu.v1.GenerateRequest`.

    `quantization`, `lora` and `sampling` are opaque proto JSON with proto field names. `adapter` names what the files
    are of: `adapter`, or a checkpoint.
    """

    base_model: str
    weights_digest: str = ""
    model_type: str = ""
    training_type: str = ""
    quantization: Mapping[str, Any] = field(default_factory=dict)
    adapter: str = ""
    adapter_files: tuple[FileReference, ...] = ()
    lora: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str = ""
    messages: tuple[ChatMessage, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GeneratedPart:
    """New text and the tokens behind it. The last part has a finish reason, by its contract name without prefix, and
    statistics as proto JSON."""

    text: str
    num_tokens: int
    finish_reason: str = ""
    statistics: Mapping[str, Any] | None = None
