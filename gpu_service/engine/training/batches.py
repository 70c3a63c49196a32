"""Turns planned examples into flat batches: one row of tokens without padding, positions restarting at each sequence.

Says which examples share a forward pass and what lies where in it; which examples make a step is the plan's. Adds no
token, drops none, reorders none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from gpu_service.domain.planned_data import Example, ExampleReference, PlannedData
from gpu_service.engine.training.flat_attention import FlatLayout
from tunesmith.common.v1 import training_spec_pb2

# A rotary embedding that has one set of frequencies up to a length, and another for every position of what is longer.
_TWO_FREQUENCIES = "longrope"


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Examples of one forward pass, end to end: T tokens, of which K carry loss, in S sequences.

    `input_ids` and `position_ids` are int64 [1, T]. The logits at `target_positions` (int64 [K], ascending) speak of
    `labels` (int64 [K]). Tuples of the length of `sources` have one entry an example; `sources` index the plan's.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    target_positions: torch.Tensor
    labels: torch.Tensor
    layout: FlatLayout
    # Targets of each sequence: [S].
    targets_by_sequence: tuple[int, ...]
    sources: tuple[int, ...]
    tokens_by_example: tuple[int, ...]
    targets_by_example: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return sum(self.tokens_by_example)

    @property
    def num_target_tokens(self) -> int:
        return sum(self.targets_by_example)

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on `device`; the host does not wait for the copies."""
        return MicroBatch(
            input_ids=_send(self.input_ids, device),
            position_ids=_send(self.position_ids, device),
            target_positions=_send(self.target_positions, device),
            labels=_send(self.labels, device),
            layout=self.layout,
            targets_by_sequence=self.targets_by_sequence,
            sources=self.sources,
            tokens_by_example=self.tokens_by_example,
            targets_by_example=self.targets_by_example,
        )


@dataclass(frozen=True, kw_only=True)
class MicroBatchLimit:
    """What a forward pass may hold; None is no limit. An example that is longer than `tokens` gets a pass of its own.

    Examples on different sides of `boundary_tokens` never share a pass.
    """

    examples: int | None = None
    tokens: int | None = None
    boundary_tokens: int | None = None

    @classmethod
    def of(cls, batch: training_spec_pb2.Batch, config: Any) -> MicroBatchLimit:
        """The plan's limits, and those of the model's `config`. Without micro-batches, a step's size is the limit."""
        return cls(
            examples=batch.micro_batch_examples or batch.examples or None,
            tokens=batch.micro_batch_tokens or batch.tokens or None,
            boundary_tokens=_frequency_boundary(config),
        )


def split(
    data: PlannedData, references: Sequence[ExampleReference], limit: MicroBatchLimit
) -> Iterator[list[ExampleReference]]:
    """`references` in order, in runs that keep to `limit`; each run is as long as it can be."""
    run: list[ExampleReference] = []
    tokens, is_long = 0, False
    for reference in references:
        lengths = _sequence_lengths(data.example(reference))
        length = sum(lengths)
        beyond = limit.boundary_tokens is not None and max(lengths) > limit.boundary_tokens
        full = (
            (limit.examples is not None and len(run) >= limit.examples)
            or (limit.tokens is not None and tokens + length > limit.tokens)
            or beyond != is_long
        )
        if run and full:
            yield run
            run, tokens = [], 0
        run.append(reference)
        tokens += length
        is_long = beyond
    if run:
        yield run


def collate(data: PlannedData, references: Sequence[ExampleReference]) -> MicroBatch:
    """One micro-batch of `references`, on the host. The first token of a sequence is never a target.

    A preference pair is two sequences, the chosen one first; any other example is one.
    """
    examples = [data.example(reference) for reference in references]
    lengths = tuple(length for example in examples for length in _sequence_lengths(example))
    starts = numpy.concatenate(([0], numpy.cumsum(lengths)))[:-1]
    input_ids = numpy.concatenate([_tokens(example) for example in examples])
    is_target = numpy.concatenate([_mask(example) for example in examples])
    is_target[starts] = False
    positions = numpy.arange(len(input_ids), dtype=numpy.int64) - numpy.repeat(starts, lengths)
    targets = is_target.nonzero()[0]
    tokens_by_example = tuple(len(example.tokens) for example in examples)
    first_tokens = numpy.concatenate(([0], numpy.cumsum(tokens_by_example)))[:-1]
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(positions)[None],
        target_positions=torch.from_numpy(targets - 1),
        labels=torch.from_numpy(input_ids[targets]),
        layout=FlatLayout(lengths=lengths),
        targets_by_sequence=tuple(numpy.add.reduceat(is_target, starts, dtype=numpy.int64).tolist()),
        sources=tuple(reference.source_index for reference in references),
        tokens_by_example=tokens_by_example,
        targets_by_example=tuple(numpy.add.reduceat(is_target, first_tokens, dtype=numpy.int64).tolist()),
    )


def _sequence_lengths(example: Example) -> tuple[int, ...]:
    length = len(example.tokens)
    return (example.rejected_start, length - example.rejected_start) if example.rejected_start else (length,)


def _tokens(example: Example) -> numpy.ndarray[Any, numpy.dtype[numpy.int64]]:
    return numpy.frombuffer(example.tokens, dtype=numpy.int32).astype(numpy.int64)


def _mask(example: Example) -> numpy.ndarray[Any, numpy.dtype[numpy.bool_]]:
    return numpy.frombuffer(example.mask, dtype=numpy.uint8) != 0


def _send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _frequency_boundary(config: Any) -> int | None:
    """Length at which the model's positions begin to mean something else for the whole pass; None for most models."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") != _TWO_FREQUENCIES:
        return None
    return int(parameters.get("original_max_position_embeddings") or config.original_max_position_embeddings)
