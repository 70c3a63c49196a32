"""The peers' side of a row: transformers' Trainer, TRL's SFTTrainer or Unsloth's, as their documentation starts them.

Started by `benchmarks.against_peer`, which says when it may run. The peers are no dependency of the product: they are
installed by `benchmarks/peers-requirements.txt` into an environment of the benchmark's own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from benchmarks.peers.rows import DENSE_LENGTH, LEARNING_RATE, LORA_RANK, MAX_GRADIENT_NORM, ROWS, TARGETS, Row
from benchmarks.peers.sides import SIDES, Side
from benchmarks.peers.stream import read_steps
from benchmarks.peers.turns import TurnTaker

_PADDED_EXAMPLES = 8
_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "trl", "liger-kernel", "datasets")
_UNSLOTH_LIBRARIES = ("unsloth", "unsloth-zoo")
_NEVER = 10**6


def main() -> int:
    """Status 0 when every turn came."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=tuple(SIDES), required=True)
    parser.add_argument("--row", choices=tuple(ROWS), required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--stream", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--turn-steps", type=int, required=True)
    arguments = parser.parse_args()
    side, row = SIDES[arguments.side], ROWS[arguments.row]
    taker = TurnTaker.of_environment()
    # Before a library is imported.
    os.environ.update({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    _import(side)
    import torch

    from benchmarks.peers.clock import StepClock, peak_allocated_bytes

    taker.tell_and_wait("imported")
    steps = read_steps(arguments.stream)
    trainer = _MAKERS[side.library](side, row, arguments.model, arguments.work, steps)
    # Dense rows are not repacked: their first step is our first step.
    first_batch_loss = None if row.stream == "dense" else _measure_first_batch(trainer, steps[0], side)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    stopper = _make_stopper()
    trainer.add_callback(stopper)
    clock = StepClock(
        taker=taker, end_training=stopper.stop, warmup_steps=arguments.warmup, turn_steps=arguments.turn_steps
    )
    tokens, losses = _watch(trainer)
    trainer.train()
    names = (*_LIBRARIES, *(_UNSLOTH_LIBRARIES if side.library == "unsloth" else ()))
    result = {
        "intervals": clock.intervals,
        "profile": clock.profile,
        "step_tokens": [int(count) for count in tokens],
        "losses": [float(loss) for loss in losses],
        "first_batch_loss": float(losses[0]) if first_batch_loss is None else first_batch_loss,
        "peak_allocated_bytes": peak_allocated_bytes(),
        "trained_parameters": sum(one.numel() for one in trainer.model.parameters() if one.requires_grad),
        "versions": _versions(names),
    }
    arguments.out.write_text(json.dumps(result), encoding="utf-8")
    taker.tell("done")
    return 0


def _import(side: Side) -> None:
    if side.library == "unsloth":
        # First of all, as its documentation asks.
        import_module("unsloth")
    for name in ("torch", "transformers", "bitsandbytes", "peft"):
        import_module(name)
    if side.library != "transformers":
        import_module("datasets")
        import_module("trl")


def _make_transformers(side: Side, row: Row, model_directory: Path, work: Path, steps: list[list[list[int]]]) -> Any:
    import peft
    from transformers import Trainer, TrainingArguments

    model = _load(row, model_directory, side.attention)
    checkpointing = {"use_reentrant": False}
    if row.training_type == "qlora":
        model = peft.prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=side.recomputes, gradient_checkpointing_kwargs=checkpointing
        )
    if row.training_type != "full":
        model = peft.get_peft_model(model, _lora())
    arguments = TrainingArguments(
        gradient_checkpointing_kwargs=checkpointing,
        # A padded batch of mixed lengths holds what its longest makes of it.
        **_common(side, row, work, row.tokens_per_step // DENSE_LENGTH if row.stream == "dense" else _PADDED_EXAMPLES),
    )
    return Trainer(model=model, args=arguments, train_dataset=_rows(steps), data_collator=_pad)


def _make_trl(side: Side, row: Row, model_directory: Path, work: Path, steps: list[list[list[int]]]) -> Any:
    from transformers import AutoTokenizer
    from trl import SFTTrainer  # type: ignore[import-not-found,unused-ignore]

    lora = {} if row.training_type == "full" else {"peft_config": _lora()}
    return SFTTrainer(
        model=_load(row, model_directory, side.attention),
        args=_sft_arguments(side, row, work),
        train_dataset=_dataset(steps),
        processing_class=AutoTokenizer.from_pretrained(model_directory),
        **lora,
    )


def _make_unsloth(side: Side, row: Row, model_directory: Path, work: Path, steps: list[list[list[int]]]) -> Any:
    import torch
    from trl import SFTTrainer
    from unsloth import FastLanguageModel  # type: ignore[import-not-found,unused-ignore]

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(model_directory),
        max_seq_length=DENSE_LENGTH,
        dtype=torch.bfloat16,
        load_in_4bit=row.training_type == "qlora",
        full_finetuning=row.training_type == "full",
    )
    if row.training_type != "full":
        model = FastLanguageModel.get_peft_model(
            model,
            **_lora_settings(),
            use_gradient_checkpointing="unsloth" if side.recomputes else False,
            random_state=0,
        )
    return SFTTrainer(
        model=model,
        args=_sft_arguments(side, row, work),
        train_dataset=_dataset(steps),
        processing_class=tokenizer,
    )


_MAKERS = {"transformers": _make_transformers, "trl": _make_trl, "unsloth": _make_unsloth}


def _load(row: Row, model_directory: Path, attention: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = None
    if row.training_type == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    on_device = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(
        model_directory,
        quantization_config=quantization,
        dtype=torch.bfloat16,
        attn_implementation=attention if on_device else "sdpa",
        device_map={"": 0 if on_device else "cpu"},
    )
    model.config.use_cache = False
    return model


def _lora_settings() -> dict[str, Any]:
    return {
        "r": LORA_RANK,
        "lora_alpha": LORA_RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(TARGETS),
    }


def _lora() -> Any:
    import peft

    return peft.LoraConfig(task_type="CAUSAL_LM", **_lora_settings())


def _sft_arguments(side: Side, row: Row, work: Path) -> Any:
    from trl import SFTConfig

    return SFTConfig(
        packing=side.packs,
        max_length=DENSE_LENGTH,
        **_common(side, row, work, row.tokens_per_step // DENSE_LENGTH),
    )


def _common(side: Side, row: Row, work: Path, examples: int) -> dict[str, Any]:
    import torch

    return {
        "output_dir": str(work),
        "per_device_train_batch_size": examples,
        "gradient_accumulation_steps": 1,
        # Ended by the last turn.
        "max_steps": _NEVER,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": MAX_GRADIENT_NORM,
        "optim": "adamw_torch_fused",
        "bf16": True,
        # Unsloth's own is switched on with the adapter.
        "gradient_checkpointing": side.recomputes and side.library != "unsloth",
        "train_sampling_strategy": "sequential",
        "logging_steps": 5,
        "report_to": "none",
        "save_strategy": "no",
        "seed": 0,
        "disable_tqdm": True,
        "use_liger_kernel": side.liger,
        "use_cpu": not torch.cuda.is_available(),
    }


def _rows(steps: list[list[list[int]]]) -> list[dict[str, list[int]]]:
    return [{"input_ids": tokens} for step in steps for tokens in step]


def _dataset(steps: list[list[list[int]]]) -> Any:
    from datasets import Dataset  # type: ignore[import-not-found,unused-ignore]

    return Dataset.from_list(_rows(steps))


def _pad(rows: list[Mapping[str, list[int]]]) -> dict[str, Any]:
    """Rows of different lengths as one batch; padding carries neither attention nor loss."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[number, :length] = torch.tensor(row["input_ids"])
        mask[number, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _measure_first_batch(trainer: Any, sequences: list[list[int]], side: Side) -> float:
    """The loss of our first step's sequences before anything is trained, as this trainer computes it."""
    import torch

    targets = sum(len(tokens) - 1 for tokens in sequences)
    # Padded, all of them at once may be more than a step ever is.
    size = len(sequences) if side.packs else _PADDED_EXAMPLES
    model = trainer.model
    model.train()
    loss = 0.0
    for start in range(0, len(sequences), size):
        rows: list[dict[str, Any]] = [{"input_ids": tokens} for tokens in sequences[start : start + size]]
        if side.packs:
            rows = [{**row, "seq_lengths": [len(row["input_ids"])]} for row in rows]
        with torch.no_grad(), trainer.compute_loss_context_manager():
            batch = trainer._prepare_inputs(trainer.data_collator(rows))
            count = torch.tensor(targets, device=model.device)
            loss += float(trainer.compute_loss(model, batch, num_items_in_batch=count))
    return loss


def _watch(trainer: Any) -> tuple[list[Any], list[Any]]:
    """Real tokens and the loss of every step from now on, without waiting for the device."""
    tokens: list[Any] = []
    losses: list[Any] = []
    inner = trainer.training_step

    def counted(model: Any, inputs: Mapping[str, Any], *rest: Any, **named: Any) -> Any:
        mask = inputs.get("attention_mask")
        tokens.append(inputs["input_ids"].numel() if mask is None else mask.sum())
        loss = inner(model, inputs, *rest, **named)
        losses.append(loss.detach())
        return loss

    trainer.training_step = counted
    return tokens, losses


def _make_stopper() -> Any:
    from transformers import TrainerCallback

    class Stopper(TrainerCallback):  # type: ignore[misc,unused-ignore]
        """Ends the training at the end of the step in hand once `stop` was called."""

        def __init__(self) -> None:
            self._ends = False

        def stop(self) -> None:
            self._ends = True

        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            control.should_training_stop = self._ends

    return Stopper()


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
