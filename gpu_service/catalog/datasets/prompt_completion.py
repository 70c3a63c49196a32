"""The catalog's `prompt-completion`: a question and its answer."""

from gpu_service.catalog.datasets.entry import DatasetFormatEntry

ENTRY = DatasetFormatEntry(
    id="prompt-completion",
    description='{"prompt": "...", "completion": "..."}',
    builder="gpu_service.planner.formats.prompt_completion",
    columns=("prompt", "completion"),
    needs_chat_template=False,
)
