"""Token shards: one dataset, tokenized for one tokenizer, template, length and loss setting, kept by content.

Writes what `domain.planned_data.TokenShard` reads. A shard that is in the cache and whole is never made again.
"""

import hashlib
import importlib
import importlib.metadata
import json
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_service.catalog import datasets as dataset_formats
from gpu_service.domain.errors import Refusal
from gpu_service.domain.planned_data import (
    FLAGS_FILE,
    MASK_FILE,
    OFFSETS_FILE,
    SHARD_FILE,
    TOKENS_FILE,
    PlannedDataDamaged,
    TokenShard,
)
from gpu_service.domain.spec import DatasetReference
from gpu_service.planner.chat_template import ChatTemplate
from gpu_service.planner.progress import Progress
from gpu_service.planner.rendering import Rendered
from gpu_service.planner.rows import RowError, find_blob, malformed, read_rows
from gpu_service.planner.staging import stage_directory
from gpu_service.planner.tokenizer import TextTokenizer

# Raise it when the same row would come to other tokens or another mask.
CODE_VERSION = 2
_BATCH_EXAMPLES = 256
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """What decides the tokens of a row, beside the row. `template` is the Jinja text in use, None if there is none."""

    tokenizer_digest: str
    template: str | None
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
        self._tokenizer = tokenizer
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
        offsets, flags = array("Q", [0]), bytearray()
        dropped: dict[str, int] = {}
        digest = hashlib.sha256()
        with ExitStack() as files:
            tokens_file = files.enter_context((staged / TOKENS_FILE).open("wb"))
            mask_file = files.enter_context((staged / MASK_FILE).open("wb"))
            for batch in _batches(self._render_rows(blob, reference)):
                encoded = self._tokenizer.encode(
                    batch,
                    loss_on_all=self._settings.loss_on == "all",
                    max_length=self._settings.max_length,
                )
                for tokens, mask, cut in encoded:
                    if 1 not in mask:
                        dropped["no_target_tokens"] = dropped.get("no_target_tokens", 0) + 1
                        continue
                    tokens_file.write(tokens.tobytes())
                    mask_file.write(mask)
                    digest.update(len(tokens).to_bytes(8, "little") + tokens.tobytes() + mask)
                    offsets.append(offsets[-1] + len(tokens))
                    flags.append(int(cut))
                self._progress.advance(len(batch))
        (staged / OFFSETS_FILE).write_bytes(offsets.tobytes())
        (staged / FLAGS_FILE).write_bytes(flags)
        facts = {
            "num_examples": len(flags),
            "num_tokens": offsets[-1],
            "dropped": dropped,
            "content_digest": digest.hexdigest(),
        }
        (staged / SHARD_FILE).write_text(json.dumps(facts, sort_keys=True), encoding="utf-8")

    def _render_rows(self, blob: Path, reference: DatasetReference) -> Iterator[Rendered]:
        render: Any = importlib.import_module(dataset_formats.REGISTRY[reference.format].builder).render
        for line, row in read_rows(blob, reference):
            try:
                yield render(row, self._chat)
            except RowError as error:
                raise malformed(reference, line, str(error)) from error
            except Refusal as refusal:
                refusal.details.update(dataset_id=str(reference.dataset_id), line=str(line))
                raise


def _batches(rendered: Iterator[Rendered]) -> Iterator[list[Rendered]]:
    """Groups that are large enough to tokenize in parallel and small enough to hold."""
    batch: list[Rendered] = []
    characters = 0
    for item in rendered:
        batch.append(item)
        characters += len(item.text)
        if len(batch) == _BATCH_EXAMPLES or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _is_whole(directory: Path) -> bool:
    if not directory.is_dir():
        return False
    try:
        TokenShard(directory)
    except PlannedDataDamaged:
        return False
    return True
