"""What `benchmarks.start_up` compares with: plain transformers, PEFT and bitsandbytes, from the imports to one step.

Run as a process of its own. Its last line is JSON with the wall-clock times of what it did.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_ROWS, _LENGTH = 4, 512


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--training-type", choices=("qlora", "lora"), default="qlora")
    options = parser.parse_args(arguments)
    marks = [("process begun", time.time())]
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    marks.append(("imported", time.time()))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    quantized = options.training_type == "qlora"
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=dtype, device_map={"": device}, quantization_config=settings if quantized else None
    )
    marks.append(("base loaded", time.time()))
    if quantized:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=2e-4)
    marks.append(("adapter and optimizer made", time.time()))
    tokens = torch.randint(0, 256, (_ROWS, min(_LENGTH, model.config.max_position_embeddings)), device=device)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    value = loss.item()
    ended = time.time()
    marks.append(("first step", ended))
    print(json.dumps({"first_step": ended, "loss": value, "marks": marks}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
