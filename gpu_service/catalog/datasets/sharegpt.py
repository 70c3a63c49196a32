"""The catalog's `sharegpt`: conversations as ShareGPT has them."""

from gpu_service.catalog.datasets.entry import DatasetFormatEntry

ENTRY = DatasetFormatEntry(
    id="sharegpt",
    description='{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
    builder="gpu_service.planner.formats.sharegpt",
    columns=("conversations",),
    needs_chat_template=True,
)
