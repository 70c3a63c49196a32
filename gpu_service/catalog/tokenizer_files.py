"""Tokenizer files as facts: which there are, special tokens, chat template, digest. Tokenizes nothing."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_service.domain.errors import Fault, Refusal

FAST_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
TOOL_TEMPLATE_FILE = "additional_chat_templates/tool_use.jinja"
# Any one of these makes a tokenizer; the first is the one that needs no training library.
VOCABULARY_FILES = (FAST_FILE, "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
# Everything that can change a token id; a file that is absent is absent from the digest.
_DIGESTED_FILES = (
    *VOCABULARY_FILES, CONFIG_FILE, SPECIAL_TOKENS_FILE, TEMPLATE_FILE, TOOL_TEMPLATE_FILE,
    "added_tokens.json", "merges.txt", "config.json", "generation_config.json",
)  # fmt: skip
_MAXIMUM_JSON_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """`special_tokens` is what templates see (`bos_token` -> text); `chat_template` is None for a base without one.

    `tool_template` is the template of its own that some bases have for conversations with tools; None where
    `chat_template` is for all. `tokenizer_class` is the class that tokenizer_config.json names, empty if none.
    """

    has_fast_file: bool
    tokenizer_class: str
    special_tokens: Mapping[str, str]
    chat_template: str | None
    tool_template: str | None


def read_tokenizer_facts(directory: Path) -> TokenizerFacts:
    """Reads the small files only. Raises `Refusal` MODEL_INVALID (stage TOKENIZER): none there, or broken."""
    if not any((directory / name).is_file() for name in VOCABULARY_FILES):
        raise _invalid(FAST_FILE, "the model has no tokenizer file")
    config = read_json_object(directory / CONFIG_FILE, stage="TOKENIZER")
    tokens = {**read_json_object(directory / SPECIAL_TOKENS_FILE, stage="TOKENIZER"), **config}
    special = {name: text for name in tokens if name.endswith("_token") and (text := _token_text(tokens[name]))}
    return TokenizerFacts(
        has_fast_file=(directory / FAST_FILE).is_file(),
        tokenizer_class=str(config.get("tokenizer_class") or ""),
        special_tokens=special,
        chat_template=_read_template(directory, config, TEMPLATE_FILE, "default"),
        tool_template=_read_template(directory, config, TOOL_TEMPLATE_FILE, "tool_use"),
    )


def tokenizer_digest(directory: Path) -> str:
    """Lower-case hex SHA-256 over name and content of every file that can change a token id."""
    digest = hashlib.sha256()
    for name in _DIGESTED_FILES:
        path = directory / name
        if path.is_file():
            digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def read_json_object(path: Path, *, stage: str) -> dict[str, Any]:
    """A JSON object, empty when the file is absent. Raises `Refusal` MODEL_INVALID naming file and parser's message."""
    try:
        if path.stat().st_size > _MAXIMUM_JSON_BYTES:
            raise Refusal("MODEL_INVALID", Fault.USER, f"{path.name} is too large", stage, file=path.name)
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise Refusal(
            "MODEL_INVALID",
            Fault.USER,
            f"{path.name} cannot be read: {error}",
            stage,
            exception_type=f"{type(error).__module__}.{type(error).__qualname__}",
            file=path.name,
        ) from error
    if not isinstance(value, dict):
        raise Refusal("MODEL_INVALID", Fault.USER, f"{path.name} is not a JSON object", stage, file=path.name)
    return value


def _token_text(value: object) -> str | None:
    """A token is written as text or as an object with `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_template(directory: Path, config: Mapping[str, Any], file: str, name: str) -> str | None:
    """Files win over tokenizer_config.json, whose one template is the `default` one, as transformers has it."""
    if (directory / file).is_file():
        try:
            return (directory / file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise _invalid(file, str(error)) from error
    if (directory / TEMPLATE_FILE).is_file():
        return None
    templates = config.get("chat_template")
    if isinstance(templates, str):
        templates = [{"name": "default", "template": templates}]
    if not isinstance(templates, list):
        return None
    named = {item.get("name"): item.get("template") for item in templates if isinstance(item, Mapping)}
    text = named.get(name)
    return text if isinstance(text, str) and text else None


def _invalid(file: str, message: str) -> Refusal:
    return Refusal("MODEL_INVALID", Fault.USER, f"{file}: {message}", stage="TOKENIZER", file=file)
