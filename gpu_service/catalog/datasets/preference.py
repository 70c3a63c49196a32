"""The catalog's `preference`: two answers to a prompt, of which one is preferred."""

from gpu_service.catalog.datasets.entry import DatasetFormatEntry

ENTRY = DatasetFormatEntry(
    id="preference",
    description='{"prompt": "...", "chosen": "...", "rejected": "..."}, texts or lists of messages',
    builder="gpu_service.planner.formats.preference",
    columns=("chosen", "rejected"),
    needs_chat_template=False,
    is_preference=True,
)
