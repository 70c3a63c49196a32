"""What decides the tokens of a shard, and so its name in the cache. Writes and reads nothing."""

import hashlib
import importlib.metadata
import json
from dataclasses import dataclass

from gpu_service.domain.spec import DatasetReference

# Raise it when the same row would come to other tokens or another mask.
CODE_VERSION = 5


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """What decides the tokens of a row, beside the row.

    `template` is the Jinja text in use, None if there is none; `tool_template` that for rows with tools, if another.
    """

    tokenizer_digest: str
    template: str | None
    tool_template: str | None
    max_length: int
    loss_on: str

    def key(self, reference: DatasetReference) -> str:
        """Name of the shard's directory: lower-case hex SHA-256 over everything that decides its bytes."""
        facts = {
            **vars(self),
            "dataset": reference.sha256,
            "format": reference.format,
            "code_version": CODE_VERSION,
            "tokenizers": importlib.metadata.version("tokenizers"),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
