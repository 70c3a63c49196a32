"""The catalog's `instruction`: a task, perhaps with what to do it on, and the answer."""

from gpu_service.catalog.datasets.entry import DatasetFormatEntry

ENTRY = DatasetFormatEntry(
    id="instruction",
    description='{"instruction": "...", "input": "...", "output": "..."}, input may be left out',
    builder="gpu_service.planner.formats.instruction",
    columns=("instruction", "output"),
    needs_chat_template=False,
)
