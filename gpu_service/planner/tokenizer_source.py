"""Which `tokenizers` object stands for a model's tokenizer: the file's own, or what `transformers` makes of it.

`transformers` loads tokenizer.json as it is for some tokenizer classes and rebuilds the pipeline from its vocabulary
for all others (a Llama tokenizer without `legacy` gets another pre-tokenizer, for one). The planner must give the ids
that `AutoTokenizer` gives, so in the second case, and where there is no tokenizer.json, it asks `transformers` once and
keeps the answer in the cache. The first case needs no training library. It runs no code of the model's in either.
"""

import hashlib
import importlib
import importlib.metadata
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gpu_service.catalog.tokenizer_files import FAST_FILE, TokenizerFacts, tokenizer_digest
from gpu_service.domain.errors import Fault, Refusal

# Tokenizer classes for which tokenizer.json is the whole truth.
_VERBATIM_CLASSES = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
# Config types for which transformers takes its own class whatever the model's files name.
_OVERRULED_CONFIG_TYPES = frozenset({"qwen2"})


@dataclass(frozen=True, kw_only=True)
class TokenizerSource:
    """`backend` is a `tokenizers.Tokenizer`; `digest` names everything that decides its ids."""

    backend: Any
    special_tokens: Mapping[str, str]
    digest: str


def load_source(directory: Path, facts: TokenizerFacts, *, config_type: str, cache_directory: Path) -> TokenizerSource:
    """Raises `Refusal` MODEL_INVALID (stage TOKENIZER) with the library's own exception type and message."""
    digest = tokenizer_digest(directory)
    verbatim = facts.tokenizer_class in _VERBATIM_CLASSES and config_type not in _OVERRULED_CONFIG_TYPES
    if facts.has_fast_file and verbatim:
        return TokenizerSource(backend=_load(directory), special_tokens=facts.special_tokens, digest=digest)
    version = importlib.metadata.version("transformers")
    digest = hashlib.sha256(f"{digest}\ntransformers {version}".encode()).hexdigest()
    path = cache_directory / "tokenizers" / f"{digest}.json"
    kept = _read_kept(path)
    if kept is None:
        kept = _convert(directory)
        _keep(path, kept)
    return TokenizerSource(
        backend=Tokenizer.from_str(kept["tokenizer"]), special_tokens=kept["special_tokens"], digest=digest
    )


def _load(directory: Path) -> Any:
    try:
        return Tokenizer.from_file(str(directory / FAST_FILE))
    except Exception as error:
        raise _invalid(FAST_FILE, error) from error


def _convert(directory: Path) -> dict[str, Any]:
    transformers = importlib.import_module("transformers")
    try:
        converted = transformers.AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        raise _invalid("", error) from error
    backend = getattr(converted, "backend_tokenizer", None)
    if backend is None:
        raise _invalid("", TypeError(f"{type(converted).__name__} has no fast form"))
    special = {name: str(token) for name, token in converted.special_tokens_map.items() if isinstance(token, str)}
    return {"tokenizer": backend.to_str(), "special_tokens": special}


def _read_kept(path: Path) -> dict[str, Any] | None:
    """What was kept, None when there is nothing or it cannot be read: it only saves time."""
    try:
        kept = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    whole = isinstance(kept, dict) and isinstance(kept.get("tokenizer"), str) and "special_tokens" in kept
    return kept if whole else None


def _keep(path: Path, kept: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".staging-{secrets.token_hex(8)}")
    staged.write_text(json.dumps(kept), encoding="utf-8")
    staged.replace(path)


def _invalid(file: str, error: Exception) -> Refusal:
    return Refusal(
        "MODEL_INVALID",
        Fault.USER,
        f"the tokenizer cannot be loaded: {error}",
        stage="TOKENIZER",
        exception_type=f"{type(error).__module__}.{type(error).__qualname__}",
        file=file,
    )
