"""A PEFT model of a Llama-like family as the fast path runs it: what the loop, evaluation and probe hold as the model.

Takes the place of accelerate's prepared model for every flat batch. The PEFT model stays beside it and stays right:
trained tensors and plain linears share their memory, so checkpoints, samples and exports are made from it as ever. For
as long as this lives, what is not quantized (norms, embeddings, head) is held in the compute type; `release` undoes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from gpu_service import host_memory
from gpu_service.domain.recomputation import (
    HOST_SPARE_BYTES,
    NOTHING,
    Recomputation,
    everything,
    place_bytes,
    step_down,
)
from gpu_service.engine.fast_path.adapters import AdapterGroup, FlatAdapter, plain
from gpu_service.engine.fast_path.attention import Attention, attention_for
from gpu_service.engine.fast_path.attention_choice import AttentionChoice
from gpu_service.engine.fast_path.block import Block, BlockShape
from gpu_service.engine.fast_path.decoder import Decoder, FlatPass
from gpu_service.engine.fast_path.dropout import Dropout
from gpu_service.engine.fast_path.flat_passes import FlatPasses, sum_by_sequence
from gpu_service.engine.fast_path.fp8 import RoundedGroup, blocks_in_8_bits
from gpu_service.engine.fast_path.frozen import FrozenGroup, Scratch
from gpu_service.engine.fast_path.graphs import PassRecordings
from gpu_service.engine.fast_path.head import Head
from gpu_service.engine.fast_path.offloading import HostShelf
from gpu_service.engine.fast_path.operations import operations_for
from gpu_service.engine.fast_path.passes import Kind, LaunchedPass, Pass, measure
from gpu_service.engine.fast_path.projection import Projection
from gpu_service.engine.fast_path.recorder import CudaRecorder, Recorder
from gpu_service.engine.training.batches import MicroBatch

# Layers that read the same rows, in the order that their outputs stand in.
GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)


@dataclass(frozen=True, kw_only=True)
class FastSettings:
    """`keeps_weights`: restore quantized weights once and keep them.

    `recomputes`: every block whole; else `recomputation` says how much of which.
    """

    device: torch.device
    compute_dtype: torch.dtype
    keeps_weights: bool
    recomputes: bool = False
    # Frozen products in 8 bits: other numerics.
    in_fp8: bool = False
    recomputation: Recomputation = NOTHING
    # On CUDA: whether passes whose kernels are small may be recorded and played again.
    records: bool = True


class FastModel(torch.nn.Module):
    """Its one parameter is the flat buffer of the trained weights, under the name `adapter`."""

    # Read by `attending_within_sequences`: nothing has to be put in its place.
    attends_within_sequences = True

    def __init__(
        self,
        peft_model: Any,
        settings: FastSettings,
        *,
        operations: Any = None,
        attention: Attention | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """`operations`, `attention` and `recorder` None are the device's own; a CPU has no recorder.

        Raises AdapterNotSupported, NotNf4 for what the plan should not have sent here.
        """
        super().__init__()
        causal = peft_model.base_model.model
        self._device, self._dtype = settings.device, settings.compute_dtype
        # In a list, so that its parameters are not taken for this module's own.
        self._held = [peft_model]
        self._narrowed = _hold_in(causal, self._dtype)
        layers = causal.model.layers
        modules = [
            [getattr(getattr(layer, part), name) for name in names] for layer in layers for part, names in GROUPS
        ]
        self._flat = FlatAdapter(peft_model, modules, device=self._device)
        self.adapter = self._flat.parameter
        self._dropout = Dropout(probability=self._flat.dropout, device=self._device)
        self._scratch = Scratch(self._device, self._dtype)
        self._operations = operations or operations_for(self._device)
        rounded = blocks_in_8_bits(len(layers)) if settings.in_fp8 else range(0)
        self._projections = [
            Projection(
                frozen=_freeze(
                    [plain(module) for module in group],
                    adapter,
                    self._scratch,
                    settings,
                    rounds=number // len(GROUPS) in rounded,
                ),
                adapter=adapter,
                operations=self._operations,
                dropout=self._dropout,
                number=number,
            )
            for number, (group, adapter) in enumerate(zip(modules, self._flat.groups, strict=True))
        ]
        self._copies = self._prepare_copies()
        rounding = [one.frozen for one in self._projections if isinstance(one.frozen, RoundedGroup)]
        self._rounded = self._operations.prepare_rounded([copy for group in rounding for copy in group.copies()])
        ranked = [group for group in rounding if len(group.ranked)]
        self._bounds = self._operations.prepare_bounds(
            [group.ranked for group in ranked], [group.bound for group in ranked]
        )
        self._attention = attention or attention_for(self._device, self._dtype)
        self._recomputation = everything(len(layers)) if settings.recomputes else settings.recomputation
        self._decoder = _assemble(
            causal, self._projections, settings, self._recomputation, self._operations, self._attention
        )
        self._passes = FlatPasses(causal.model.rotary_emb, self._device)
        self._adapted = True
        if recorder is None and self._device.type == "cuda" and settings.records and self._attention.lengths_may_vary:
            recorder = CudaRecorder(self._device)
        self._recordings: PassRecordings | None = None
        if recorder is not None and self._decoder.shelf is None:
            self._recordings = PassRecordings(
                decoder=self._decoder,
                dropout=self._dropout,
                num_weights=self.adapter.numel(),
                recorder=recorder,
            )
        self._notices: list[str] = []
        self._most_tokens = 0

    @property
    def flat_adapter(self) -> FlatAdapter:
        return self._flat

    @property
    def decoder(self) -> Decoder:
        return self._decoder

    @property
    def attention(self) -> Attention:
        return self._attention

    def nats_by_sequence(self, batch: MicroBatch) -> torch.Tensor:
        """Negative log likelihood of each sequence's targets: float64 [S], with gradient where gradients are on."""
        flat = self._passes.lay_out(batch)
        self._most_tokens = max(self._most_tokens, len(flat.tokens))
        if self._adapted:
            self._operations.copy_out(self.adapter.detach(), self._copies)
            self._operations.round_out(self.adapter.detach(), self._rounded, self._dtype)
            self._operations.bound_ranks(self._bounds)
        if self._adapted and torch.is_grad_enabled():
            key = self._dropout.draw_key() if self.training else None
            nats: torch.Tensor = _Nats.apply(self.adapter, self, replace(flat, key=key))
            return nats
        kind = Kind.MEASURED if self._adapted else Kind.MEASURED_BASE
        with torch.no_grad():
            played = None if self._recordings is None else self._recordings.lend(flat, kind)
            by_target = played.forward() if played else measure(self._decoder, self._dropout, flat, kind)
            return sum_by_sequence(by_target, flat)

    def take_notices(self) -> list[str]:
        """What changed in how passes are made since the last time, for people."""
        if isinstance(self._attention, AttentionChoice):
            self._notices += self._attention.take_notices()
        if self._recordings is not None:
            self._notices += self._recordings.take_notices()
        notices, self._notices = self._notices, []
        return notices

    def give_up_recordings(self) -> str:
        """Launch every pass from now on: how, in words; empty where nothing had been recorded.

        For whoever needs their memory, or gives the weights another place: recordings know where those lay.
        """
        if self._recordings is None:
            return ""
        self._notices += self._recordings.take_notices()
        had_any, self._recordings = self._recordings.num_recorded > 0, None
        return "passes are launched kernel by kernel: recordings hold memory of their own" if had_any else ""

    def recompute_more(self) -> str:
        """Keep less of a pass from now on, with the same results: how, in words; empty where nothing more can be."""
        if described := self.give_up_recordings():
            return described
        num_layers = len(self._decoder.blocks)
        more = step_down(self._recomputation, num_layers, may_slice=True)
        if more is None or (more.offload and not self._has_host_room(more)):
            return ""
        self._recomputation = more
        shelf = HostShelf(self._device) if more.offload else None
        if self._decoder.shelf is not None:
            self._decoder.shelf.close()
        self._decoder = replace(
            self._decoder,
            levels=more.levels(num_layers),
            slices=more.feed_forward_slices,
            head=replace(self._decoder.head, chunk_rows=more.head_rows),
            shelf=shelf,
        )
        # In slices, no block's largest matrix is restored there.
        self._scratch.drop()
        return more.describe(num_layers)

    def _has_host_room(self, way: Recomputation) -> bool:
        """Whether the host has memory to spare for what waits there, of the largest pass so far; a CPU's is its own."""
        row = self._decoder.embedding.shape[1] * self._dtype.itemsize
        needed = way.full_layers * place_bytes(self._most_tokens * row)
        # The shelf that there is goes before the next one is filled.
        needed -= 0 if self._decoder.shelf is None else self._decoder.shelf.held_bytes
        if needed <= 0 or self._device.type == "cpu":
            return True
        return needed + HOST_SPARE_BYTES <= host_memory.available_bytes()

    def stream_weights(self) -> str:
        """Let go of quantized weights that stand restored, with the same results: how, in words; empty for none."""
        # They know where the weights lay.
        if described := self.give_up_recordings():
            return described
        groups = [one.frozen for one in self._projections if isinstance(one.frozen, FrozenGroup)]
        restored = [group for group in groups if group.is_restored]
        if not restored:
            return ""
        # They hold the margins, which lie in the restored weights. All of it goes before any memory is asked for.
        del self._copies
        for group in restored:
            group.drop_restored()
        for group in restored:
            group.stream()
        self._copies = self._prepare_copies()
        return "weights are restored at each use"

    def _prepare_copies(self) -> Any:
        copies = [copy for one in self._projections for copy in one.adapter.copies(one.frozen.margins)]
        return self._operations.prepare_copies(copies)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the base as it is."""
        before, self._adapted = self._adapted, False
        try:
            yield
        finally:
            self._adapted = before

    def release(self) -> None:
        """Give the base back as it was. The fast path cannot run any more; a second time does nothing."""
        if not self._held:
            return
        self._recordings = None
        if self._decoder.shelf is not None:
            self._decoder.shelf.close()
        del self._decoder, self._copies, self._rounded, self._bounds, self._projections
        for parameter, dtype in self._narrowed:
            parameter.data = parameter.data.to(dtype)
        for parameter in self._held[0].parameters():
            # Plain linears are views of matrices with margins, which go with the last of them.
            if not parameter.requires_grad and not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()
        self._narrowed = []
        self._held = []

    def _take_pass(self, flat: FlatPass) -> Pass:
        played = None if self._recordings is None else self._recordings.lend(flat, Kind.TRAINED)
        return played or LaunchedPass(self._decoder, self._dropout, flat, self.adapter.numel())


class _Nats(torch.autograd.Function):
    """What autograd sees of the fast path: one function of the flat buffer."""

    @staticmethod
    def forward(context: Any, adapter: torch.Tensor, model: FastModel, flat: FlatPass) -> torch.Tensor:
        del adapter
        work = model._take_pass(flat)
        context.flat, context.work = flat, work
        return sum_by_sequence(work.forward(), flat)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        work: Pass = context.work
        context.work = None
        return work.backward(upstream.index_select(0, context.flat.sequences)), None, None


def _hold_in(causal: Any, dtype: torch.dtype) -> list[tuple[torch.nn.Parameter, torch.dtype]]:
    """Hold what is neither quantized nor trained in `dtype`; what was in another one, with that one."""
    changed = []
    for parameter in causal.parameters():
        if not parameter.requires_grad and parameter.is_floating_point() and parameter.dtype != dtype:
            changed.append((parameter, parameter.dtype))
            parameter.data = parameter.data.to(dtype)
    return changed


def _freeze(
    layers: Sequence[Any], adapter: AdapterGroup, scratch: Scratch, settings: FastSettings, *, rounds: bool
) -> FrozenGroup | RoundedGroup:
    if rounds:
        return RoundedGroup(layers, adapter, dtype=settings.compute_dtype)
    # Kept, a weight takes as many bytes as the two that are rounded for either direction.
    keep = settings.keeps_weights or settings.in_fp8
    return FrozenGroup(layers, room=adapter.room, scratch=scratch, dtype=settings.compute_dtype, keep=keep)


def _assemble(
    causal: Any,
    projections: Sequence[Projection],
    settings: FastSettings,
    recomputation: Recomputation,
    operations: Any,
    attention: Attention,
) -> Decoder:
    config = causal.config
    first = causal.model.layers[0].self_attn
    shape = BlockShape(
        heads=config.num_attention_heads,
        key_value_heads=config.num_key_value_heads,
        head_dim=first.head_dim,
        epsilon=config.rms_norm_eps,
    )
    blocks = []
    for number, layer in enumerate(causal.model.layers):
        attention_in, attention_out, mlp_in, mlp_out = projections[4 * number : 4 * number + 4]
        query_norm, key_norm = getattr(layer.self_attn, "q_norm", None), getattr(layer.self_attn, "k_norm", None)
        blocks.append(
            Block(
                shape=shape,
                operations=operations,
                attention=attention,
                first_norm=layer.input_layernorm.weight.data,
                second_norm=layer.post_attention_layernorm.weight.data,
                query_norm=None if query_norm is None else query_norm.weight.data,
                key_norm=None if key_norm is None else key_norm.weight.data,
                attention_in=attention_in,
                attention_out=attention_out,
                mlp_in=mlp_in,
                mlp_out=mlp_out,
            )
        )
    head = Head(
        operations=operations,
        norm=causal.model.norm.weight.data,
        epsilon=config.rms_norm_eps,
        weight=causal.lm_head.weight.data,
        chunk_rows=recomputation.head_rows,
    )
    embedding = causal.model.embed_tokens.weight.data
    return Decoder(
        embedding=embedding,
        blocks=blocks,
        head=head,
        levels=recomputation.levels(len(blocks)),
        slices=recomputation.feed_forward_slices,
        shelf=HostShelf(settings.device) if recomputation.offload else None,
    )
