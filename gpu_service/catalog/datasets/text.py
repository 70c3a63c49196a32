"""The catalog's `text`: running text, every token of which is learned."""

from gpu_service.catalog.datasets.entry import DatasetFormatEntry

ENTRY = DatasetFormatEntry(
    id="text",
    description='{"text": "..."}',
    builder="gpu_service.planner.formats.text",
    columns=("text",),
    needs_chat_template=False,
)
