"""Dataset formats by id."""

from collections.abc import Mapping
from types import MappingProxyType

from gpu_service.catalog.datasets import chat_messages, instruction, preference, prompt_completion, sharegpt, text
from gpu_service.catalog.datasets.entry import DatasetFormatEntry

REGISTRY: Mapping[str, DatasetFormatEntry] = MappingProxyType(
    {
        "chat-messages": chat_messages.ENTRY,
        "sharegpt": sharegpt.ENTRY,
        "prompt-completion": prompt_completion.ENTRY,
        "instruction": instruction.ENTRY,
        "text": text.ENTRY,
        "preference": preference.ENTRY,
    }
)
