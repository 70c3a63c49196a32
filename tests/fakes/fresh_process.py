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

# Standard input: a list of {"model", "adapter"?, "dtype", "quantized", "prompts", "examples"}. Prints, for each, logits
# after the last token of every prompt, the loss of the examples' targets, the rendered chat and what the config says;
# and the modules that were imported.
_PROGRAM = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

torch.set_num_threads(1)

def judge_examples(model, examples):
    nats = targets = 0
    with torch.no_grad():
        for tokens, mask in examples:
            logits = model(input_ids=torch.tensor([tokens])).logits[0].float()
            losses = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="none")
            wanted = torch.tensor(mask[1:], dtype=torch.bool)
            nats += float(losses[wanted].double().sum())
            targets += int(wanted.sum())
    return nats / targets

def judge(asked):
    quantized = asked["quantized"]
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    quantization = {"quantization_config": nf4} if quantized else {}
    model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=asked["dtype"], **quantization)
    if asked.get("adapter"):
        model = PeftModel.from_pretrained(model, asked["adapter"])
    # In evaluation mode some CPUs compute 4-bit layers in bfloat16; dropout is 0 here, so the other mode is the same.
    model.train(quantized)
    tokenizer = AutoTokenizer.from_pretrained(asked.get("adapter") or asked["model"])
    with torch.no_grad():
        logits = [
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].float().tolist()
            for text in asked["prompts"]
        ]
    loss = judge_examples(model, asked["examples"]) if asked["examples"] else None
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    dtypes = sorted({str(parameter.dtype) for parameter in model.parameters()})
    tied = model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    return {"logits": logits, "loss": loss, "chat": chat, "dtypes": dtypes, "tied": tied}

answers = [judge(asked) for asked in json.loads(sys.stdin.read())]
ours = sorted(name for name in sys.modules if name.split(".")[0] in ("gpu_service", "tunesmith", "bitsandbytes"))
print(json.dumps({"answers": answers, "ours": [name for name in ours if not name.startswith("bitsandbytes")]}))
"""


def ask(
    model: Path,
    prompts: Sequence[str] = (),
    *,
    examples: Sequence[tuple[list[int], list[int]]] = (),
    adapter: Path | None = None,
    dtype: str = "float32",
    quantized: bool = False,
) -> dict[str, Any]:
    """One question for `load_elsewhere`. `examples`: tokens and masks. `quantized`: in nf4. `dtype` may be `auto`."""
    asked: dict[str, Any] = {
        "model": str(model),
        "prompts": list(prompts),
        "examples": list(examples),
        "dtype": dtype,
        "quantized": quantized,
    }
    return asked if adapter is None else asked | {"adapter": str(adapter)}


def load_elsewhere(asked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of one fresh process: `logits` by prompt, `loss`, `chat`, `dtypes`, `tied`."""
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
