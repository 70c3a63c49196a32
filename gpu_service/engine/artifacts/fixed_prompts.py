"""The prompts on which an export is compared with its adapter. Changing one changes what earlier reports compare to.

Prose, code, sums, lists and other languages: an export that is right on these is right elsewhere, since a merge that
goes wrong goes wrong in weights that every text passes through.
"""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

# Tokens of a prompt that are compared, at most.
MAX_PROMPT_TOKENS = 48

PLAIN: tuple[str, ...] = (
    "The capital of France is Paris, and the capital of Italy is Rome. The capital of Spain is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Wasser kocht auf Meereshöhe bei hundert Grad Celsius, auf hohen Bergen aber schon bei",
    '{"name": "Ada Lovelace", "born": 1815, "known_for": ["the first program", "notes on',
)
# Rendered as a user's turn where the tokenizer has a chat template that takes one, else plain.
CHAT: tuple[str, ...] = (
    "What is 17 plus 25? Explain each step.",
    "Write one sentence about the sea.",
    "Name three primary colors, as a list.",
    "Is a whale a fish? Answer yes or no, then say why.",
)


def tokenize(tokenizer: Any) -> list[list[int]]:
    """Token ids of every prompt, cut at MAX_PROMPT_TOKENS."""
    texts = (*PLAIN, *(_render(tokenizer, prompt) for prompt in CHAT))
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"])[:MAX_PROMPT_TOKENS] for text in texts]


def _render(tokenizer: Any, prompt: str) -> str:
    if not tokenizer.chat_template:
        return prompt
    turns = [{"role": "user", "content": prompt}]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except TemplateError:
        # One that wants a system's turn first, say: what is compared is weights, and they see the text all the same.
        return prompt
