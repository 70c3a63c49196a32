"""Loads what a run left in a process of its own, with nothing of ours in it: torch, transformers and peft alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TIMEOUT_SECONDS = 110

# Standard input: a list of {"model", "adapter"?, "dtype", "prompts"}. Prints, for each, logits after the last token of
# every prompt, the rendered chat and what the model's config says; and the modules that were imported.
_PROGRAM = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)

def judge(asked):
    model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=asked["dtype"])
    if asked.get("adapter"):
        model = PeftModel.from_pretrained(model, asked["adapter"])
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(asked.get("adapter") or asked["model"])
    with torch.no_grad():
        logits = [
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].float().tolist()
            for text in asked["prompts"]
        ]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    dtypes = sorted({str(parameter.dtype) for parameter in model.parameters()})
    tied = model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    return {"logits": logits, "chat": chat, "dtypes": dtypes, "tied": tied}

answers = [judge(asked) for asked in json.loads(sys.stdin.read())]
ours = sorted(name for name in sys.modules if name.split(".")[0] in ("gpu_service", "tunesmith", "bitsandbytes"))
print(json.dumps({"answers": answers, "ours": [name for name in ours if not name.startswith("bitsandbytes")]}))
"""


def ask(model: Path, prompts: Sequence[str], *, adapter: Path | None = None, dtype: str = "float32") -> dict[str, Any]:
    """One question for `load_elsewhere`; `dtype` may be `auto`."""
    asked: dict[str, Any] = {"model": str(model), "prompts": list(prompts), "dtype": dtype}
    return asked if adapter is None else asked | {"adapter": str(adapter)}


def load_elsewhere(asked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of one fresh process: `logits` by prompt, `chat`, `dtypes`, `tied`."""
    finished = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        input=json.dumps(list(asked)),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=_TIMEOUT_SECONDS,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    said = json.loads(finished.stdout.splitlines()[-1])
    assert not said["ours"]
    answers: list[dict[str, Any]] = said["answers"]
    return answers
