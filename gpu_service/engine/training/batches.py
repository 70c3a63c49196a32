"""Turns planned examples into padded tensors. Pads on the right with a mask; never adds a token to the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch

from gpu_service.domain.planned_data import ExampleReference, PlannedData

# Any valid id serves: the attention mask hides it and it never carries loss.
_PADDING_ID = 0


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Examples of one forward pass: [rows, longest] each. `is_target` marks tokens that carry loss.

    Positions run from 0 at the first token of each row. `sources[row]` indexes the plan's sources.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    is_target: torch.Tensor
    sources: tuple[int, ...]
    num_tokens: int
    num_target_tokens: int

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on `device`."""
        return MicroBatch(
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            is_target=self.is_target.to(device),
            sources=self.sources,
            num_tokens=self.num_tokens,
            num_target_tokens=self.num_target_tokens,
        )


def collate(data: PlannedData, references: Sequence[ExampleReference]) -> MicroBatch:
    """One micro-batch of `references`. A row's first token is never a target."""
    examples = [data.example(reference) for reference in references]
    longest = max(len(example.tokens) for example in examples)
    input_ids = numpy.full((len(examples), longest), _PADDING_ID, dtype=numpy.int64)
    attention_mask = numpy.zeros((len(examples), longest), dtype=numpy.int64)
    is_target = numpy.zeros((len(examples), longest), dtype=numpy.bool_)
    for row, example in enumerate(examples):
        length = len(example.tokens)
        input_ids[row, :length] = numpy.frombuffer(example.tokens, dtype=numpy.int32)
        attention_mask[row, :length] = 1
        is_target[row, :length] = numpy.frombuffer(example.mask, dtype=numpy.uint8) != 0
    is_target[:, 0] = False
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        is_target=torch.from_numpy(is_target),
        sources=tuple(reference.source_index for reference in references),
        num_tokens=int(attention_mask.sum()),
        num_target_tokens=int(is_target.sum()),
    )


def split(references: Sequence[ExampleReference], size: int) -> list[Sequence[ExampleReference]]:
    """`references` in runs of at most `size`, in order."""
    return [references[start : start + size] for start in range(0, len(references), size)]
