"""Dataset formats by id."""

from collections.abc import Mapping
from types import MappingProxyType

from gpu_service.catalog.datasets import chat_messages, prompt_completion, text
from gpu_service.catalog.datasets.entry import DatasetFormatEntry

REGISTRY: Mapping[str, DatasetFormatEntry] = MappingProxyType(
    {
        "chat-messages": chat_messages.ENTRY,
        "prompt-completion": prompt_completion.ENTRY,
        "text": text.ENTRY,
    }
)
