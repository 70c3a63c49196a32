"""The sides that a row is measured on: ours, and the peers with the settings that each is measured in.

A peer is there as its documentation has it (`transformers`) and at its best (`trl`, `unsloth`); the others say what one
setting is worth, or what can be installed. Starts nothing and imports no training library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

OURS = "tunesmith"
# Ours without an event for each step: what telling every step costs.
SILENT = "tunesmith-silent"


@dataclass(frozen=True, kw_only=True)
class Side:
    """`library`: whose trainer runs. `module`: what runs it in a process of its own."""

    summary: str
    library: str
    module: str = "benchmarks.peers.trainers"
    # Whole sequences put together; otherwise batches are padded to their longest.
    packs: bool = True
    recomputes: bool = False
    # Liger's kernels for norms, rotary positions and SwiGLU.
    liger: bool = False
    attention: str = "flash_attention_2"
    # Importing it already takes memory of the device.
    takes_memory_at_import: bool = False
    # With no kernels under the name of flash-attn 2 but its own, of which PyPI has the source alone.
    as_installed: bool = False


SIDES: Mapping[str, Side] = {
    OURS: Side(summary="this project, through its engine", library="tunesmith", module="benchmarks.peers.ours"),
    SILENT: Side(
        summary="this project, its steps' events kept from the journal",
        library="tunesmith",
        module="benchmarks.peers.ours",
    ),
    "transformers": Side(
        summary="transformers Trainer + PEFT + bitsandbytes, as documented: padded, checkpointing",
        library="transformers",
        packs=False,
        recomputes=True,
        attention="sdpa",
    ),
    "trl": Side(summary="TRL SFTTrainer, packing, Liger", library="trl", liger=True),
    "trl-recompute": Side(
        summary="TRL SFTTrainer, packing, Liger, checkpointing", library="trl", liger=True, recomputes=True
    ),
    "trl-plain": Side(summary="TRL SFTTrainer, packing", library="trl"),
    "trl-plain-recompute": Side(summary="TRL SFTTrainer, packing, checkpointing", library="trl", recomputes=True),
    "unsloth": Side(summary="Unsloth, packing", library="unsloth", takes_memory_at_import=True),
    "unsloth-as-installed": Side(
        summary="Unsloth, packing, without flash-attn 2",
        library="unsloth",
        takes_memory_at_import=True,
        as_installed=True,
    ),
    "unsloth-recompute": Side(
        summary="Unsloth, packing, its offloading checkpointing",
        library="unsloth",
        recomputes=True,
        takes_memory_at_import=True,
    ),
}
PEERS = tuple(name for name in SIDES if name != OURS)
