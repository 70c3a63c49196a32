"""From a base's files and a few settings to what renders and tokenizes rows. Reads no row and no weight."""

from dataclasses import dataclass
from pathlib import Path

from gpu_service.catalog import templates
from gpu_service.catalog.base_models import BaseModel
from gpu_service.catalog.tokenizer_files import read_tokenizer_facts
from gpu_service.planner.chat_template import ChatTemplate
from gpu_service.planner.shard_settings import ShardSettings
from gpu_service.planner.tokenizer import TextTokenizer
from gpu_service.planner.tokenizer_source import load_source


@dataclass(frozen=True, kw_only=True)
class Toolchain:
    """`chat` is None for a base without a chat template when none is named."""

    settings: ShardSettings
    tokenizer: TextTokenizer
    chat: ChatTemplate | None


def load_toolchain(
    base: BaseModel,
    *,
    cache_directory: Path,
    chat_template: str | None,
    max_length: int,
    loss_on: str,
    keeps_ids: bool = False,
) -> Toolchain:
    """`chat_template` is a catalog id, None for the base's own; `keeps_ids` is `load_source`'s.

    Raises `Refusal` MODEL_INVALID or CHAT_TEMPLATE_UNUSABLE, at stage TOKENIZER.
    """
    facts = read_tokenizer_facts(base.directory)
    template, tool_template = facts.chat_template, facts.tool_template
    if chat_template:
        template, tool_template = templates.REGISTRY[chat_template].read_text(), None
    source = load_source(
        base.directory, facts, config_type=base.config_type, cache_directory=cache_directory, keeps_ids=keeps_ids
    )
    return Toolchain(
        settings=ShardSettings(
            tokenizer_digest=source.digest,
            template=template,
            tool_template=tool_template,
            max_length=max_length,
            loss_on=loss_on,
        ),
        tokenizer=TextTokenizer(source, base.config),
        chat=ChatTemplate(template, source.special_tokens, tool_text=tool_template) if template else None,
    )
