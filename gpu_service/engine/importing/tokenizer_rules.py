"""Gives a tokenizer that was read from a GGUF file the text splitting rule the file names.

A GGUF file carries a byte-level vocabulary and merges, but its splitting rule only as a name (`tokenizer.ggml.pre`).
transformers knows some of those names, which ones depends on its version, and quietly takes GPT-2's rule for the
others; that gives other tokens for the same text than the model was trained on. This module refuses a name that is
not in its table rather than guess.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Regex, Tokenizer, pre_tokenizers

from gpu_service.engine.importing.errors import ImportRefused, Reason

_WORDS_WITH_NUMBERS_OF = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{numbers}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_byte_level() -> pre_tokenizers.PreTokenizer:
    # Every digit stands alone, so that white space before a number is split as at the end of a text.
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


def _pattern_then_byte_level(numbers: str) -> pre_tokenizers.PreTokenizer:
    pattern = Regex(_WORDS_WITH_NUMBERS_OF.format(numbers=numbers))
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


RULES: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _byte_level,
    "llama-bpe": lambda: _pattern_then_byte_level(r"\p{N}{1,3}"),
    "qwen2": lambda: _pattern_then_byte_level(r"\p{N}"),
    "smollm": _digits_then_byte_level,
}


def apply_splitting_rule(tokenizer: Tokenizer, vocabulary_kind: str, rule_name: str | None) -> None:
    """Set the rule in place; only byte-level (`gpt2`) vocabularies have one."""
    if vocabulary_kind != "gpt2":
        return
    if rule_name is None or rule_name not in RULES:
        raise ImportRefused(
            Reason.UNSUPPORTED_TOKENIZER,
            f"the GGUF file names the text splitting rule {rule_name!r}; known rules are {', '.join(sorted(RULES))}. "
            "Import the Hugging Face directory of this model instead.",
        )
    tokenizer.pre_tokenizer = RULES[rule_name]()
