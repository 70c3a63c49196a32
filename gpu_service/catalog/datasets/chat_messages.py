"""The catalog's `chat-messages`: conversations."""

from gpu_service.catalog.datasets.entry import DatasetFormatEntry

ENTRY = DatasetFormatEntry(
    id="chat-messages",
    description='{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    builder="gpu_service.planner.formats.chat_messages",
    columns=("messages",),
    needs_chat_template=True,
)
