"""Answers sample prompts, greedily, so that before and after differ by the training alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gpu_service.engine.training.modes import measuring

GENERATION_FILE = "generation_config.json"


def stop_token_ids(model_directory: Path, model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: what the model's config, its generation config and its tokenizer name, sorted."""
    # Not imported where nothing is answered: it takes seconds.
    from transformers import GenerationConfig

    named: list[int | list[int] | None] = [model.config.eos_token_id, tokenizer.eos_token_id]
    if (model_directory / GENERATION_FILE).is_file():
        named.append(GenerationConfig.from_pretrained(model_directory, local_files_only=True).eos_token_id)
    ids: set[int] = set()
    for entry in named:
        ids.update([entry] if isinstance(entry, int) else entry or [])
    return sorted(ids)


def answer(
    model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int, stop_ids: list[int], device: torch.device
) -> str:
    """The greedy answer to `prompt`, without the prompt. Rendered as a user's turn when there is a chat template."""
    # Not imported where nothing is answered: it takes seconds.
    from transformers import GenerationConfig

    if tokenizer.chat_template is not None:
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    input_ids = encoded["input_ids"].to(device)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids or None,
        # Only names what fills up finished rows; there is one row.
        pad_token_id=stop_ids[0] if stop_ids else 0,
        use_cache=True,
    )
    with measuring(model):
        output = model.generate(
            input_ids=input_ids,
            attention_mask=encoded["attention_mask"].to(device),
            generation_config=settings,
        )
    text: str = tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)
    return text
