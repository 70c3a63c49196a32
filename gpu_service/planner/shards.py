"""Token shards: one dataset, tokenized for one tokenizer, template, length and loss setting, kept by content.

Writes what `domain.planned_data.TokenShard` reads. A shard that is in the cache and whole is never made again.
"""

import hashlib
import importlib.metadata
import json
from array import array
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from gpu_service.catalog import datasets as dataset_formats
from gpu_service.domain.planned_data import (
    FLAGS_FILE,
    MASK_FILE,
    OFFSETS_FILE,
    REJECTED_FILE,
    SHARD_FILE,
    TOKENS_FILE,
    PlannedDataDamaged,
    TokenShard,
)
from gpu_service.domain.spec import DatasetReference
from gpu_service.planner.chat_template import ChatTemplate
from gpu_service.planner.encoding import ExampleEncoder, split_batches
from gpu_service.planner.progress import Progress
from gpu_service.planner.row_rendering import RowRenderer
from gpu_service.planner.rows import find_blob, read_rows
from gpu_service.planner.staging import stage_directory
from gpu_service.planner.tokenizer import TextTokenizer

# Raise it when the same row would come to other tokens or another mask.
CODE_VERSION = 3


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


class ShardMaker:
    """Makes the shards of one plan, or finds them. Raises `Refusal` as reading, rendering and tokenizing do."""

    def __init__(
        self,
        *,
        blobs_directory: Path,
        tokens_directory: Path,
        settings: ShardSettings,
        tokenizer: TextTokenizer,
        chat: ChatTemplate | None,
        progress: Progress,
    ) -> None:
        self._blobs_directory = blobs_directory
        self._tokens_directory = tokens_directory
        self._settings = settings
        self._encoder = ExampleEncoder(tokenizer, loss_on_all=settings.loss_on == "all", max_length=settings.max_length)
        self._chat = chat
        self._progress = progress

    def ensure(self, reference: DatasetReference) -> TokenShard:
        """The dataset's shard, from the cache or made now."""
        target = self._tokens_directory / self._settings.key(reference)
        if _is_whole(target):
            self._progress.advance(reference.num_examples)
            return TokenShard(target)
        blob = find_blob(self._blobs_directory, reference)
        with stage_directory(target, is_whole=_is_whole) as staged:
            self._write(staged, blob, reference)
        return TokenShard(target)

    def _write(self, staged: Path, blob: Path, reference: DatasetReference) -> None:
        offsets, flags, rejected = array("Q", [0]), bytearray(), array("I")
        has_pairs = dataset_formats.REGISTRY[reference.format].is_preference
        renderer = RowRenderer(reference, self._chat)
        dropped: dict[str, int] = {}
        digest = hashlib.sha256()
        with ExitStack() as files:
            tokens_file = files.enter_context((staged / TOKENS_FILE).open("wb"))
            mask_file = files.enter_context((staged / MASK_FILE).open("wb"))
            rendered = (renderer.render(line, row) for line, row in read_rows(blob, reference))
            for batch in split_batches(rendered):
                for example in self._encoder.encode(batch):
                    if example.dropped_reason:
                        dropped[example.dropped_reason] = dropped.get(example.dropped_reason, 0) + 1
                        continue
                    tokens = example.tokens.tobytes()
                    tokens_file.write(tokens)
                    mask_file.write(example.mask)
                    digest.update(len(example.tokens).to_bytes(8, "little") + tokens + example.mask)
                    if has_pairs:
                        rejected.append(example.rejected_start)
                        digest.update(example.rejected_start.to_bytes(8, "little"))
                    offsets.append(offsets[-1] + len(example.tokens))
                    flags.append(int(example.truncated))
                self._progress.advance(len(batch))
        (staged / OFFSETS_FILE).write_bytes(offsets.tobytes())
        (staged / FLAGS_FILE).write_bytes(flags)
        (staged / REJECTED_FILE).write_bytes(rejected.tobytes())
        facts = {
            "num_examples": len(flags),
            "num_tokens": offsets[-1],
            "has_pairs": has_pairs,
            "dropped": dropped,
            "content_digest": digest.hexdigest(),
        }
        (staged / SHARD_FILE).write_text(json.dumps(facts, sort_keys=True), encoding="utf-8")


def _is_whole(directory: Path) -> bool:
    if not directory.is_dir():
        return False
    try:
        TokenShard(directory)
    except PlannedDataDamaged:
        return False
    return True
