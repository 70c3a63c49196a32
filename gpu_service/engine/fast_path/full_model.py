"""A model of a Llama-like family that is trained whole, as the fast path runs it: the counterpart of `model`.

Takes the place of accelerate's prepared model for every flat batch. The model of transformers stays beside it and stays
right: its parameters are views of the buffer that is trained, so checkpoints, samples and exports are made from it as
ever. Products are made in the compute type, sums of the residual stream too; weights are held, and stepped, in the type
that they were loaded in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from gpu_service import host_memory
from gpu_service.domain.recomputation import HOST_SPARE_BYTES, NOTHING, Recomputation, place_bytes, step_down
from gpu_service.engine.fast_path.attention import Attention, attention_for
from gpu_service.engine.fast_path.attention_choice import AttentionChoice
from gpu_service.engine.fast_path.block import BlockShape
from gpu_service.engine.fast_path.decoder import FlatPass
from gpu_service.engine.fast_path.flat_passes import FlatPasses, sum_by_sequence
from gpu_service.engine.fast_path.full_block import FullBlock
from gpu_service.engine.fast_path.full_decoder import FullDecoder, KeptFullPass
from gpu_service.engine.fast_path.full_head import FullHead, Upstream
from gpu_service.engine.fast_path.full_operations import full_operations_for
from gpu_service.engine.fast_path.full_projection import FullProjection
from gpu_service.engine.fast_path.full_weights import FlatWeights, WeightsNotSupported, head_norms
from gpu_service.engine.fast_path.model import GROUPS
from gpu_service.engine.fast_path.offloading import HostShelf
from gpu_service.engine.fast_path.operations import operations_for
from gpu_service.engine.fast_path.weight_gradients import GatheredGradients, Gradients
from gpu_service.engine.training.batches import MicroBatch


@dataclass(frozen=True, kw_only=True)
class FullSettings:
    """`accumulates`: steps have several passes, whose gradients add up in float32; else in the compute type."""

    device: torch.device
    compute_dtype: torch.dtype
    accumulates: bool = False
    recomputation: Recomputation = NOTHING


class FullModel(torch.nn.Module):
    """Its parameters are the flat buffer of what is trained, in two pieces: `matrices`, then norms and biases,
    `vectors`. Gradients are in `gradients` alone.
    """

    # Read by `attending_within_sequences`: nothing has to be put in its place.
    attends_within_sequences = True

    def __init__(
        self,
        causal: Any,
        settings: FullSettings,
        *,
        operations: Any = None,
        kernels: Any = None,
        attention: Attention | None = None,
    ) -> None:
        """`causal` is transformers' model. What is None is the device's own.

        Raises WeightsNotSupported for what the plan should not have sent here.
        """
        super().__init__()
        device, dtype = settings.device, settings.compute_dtype
        layers = causal.model.layers
        groups = [[getattr(getattr(layer, part), name) for name in names] for layer in layers for part, names in GROUPS]
        # In a list, so that its parameters are not taken for this module's own.
        self._held = [causal]
        self._settings = settings
        self.weights = FlatWeights(causal, groups, device=device, compute_dtype=dtype)
        held, boundary = self.weights.held, self.weights.num_matrix_elements
        self.matrices, self.vectors = torch.nn.Parameter(held[:boundary]), torch.nn.Parameter(held[boundary:])
        self.gradients = self._make_gradients()
        self._recomputation = settings.recomputation
        self._attention = attention or attention_for(device, dtype)
        self._decoder = _Assembly(
            causal=causal,
            weights=self.weights,
            gradients=self.gradients,
            operations=operations or operations_for(device),
            kernels=kernels or full_operations_for(device),
            attention=self._attention,
        ).assemble(groups, self._recomputation, device)
        self._passes = FlatPasses(causal.model.rotary_emb, device)
        # Whether gradients of several passes were provided for.
        self._adds_up = settings.accumulates
        # Of a pass so far.
        self._most_tokens = 0

    def _make_gradients(self) -> Any:
        settings, num_elements = self._settings, self.weights.held.numel()
        dtype = torch.float32 if settings.accumulates else settings.compute_dtype
        return GatheredGradients(num_elements, device=settings.device, dtype=dtype)

    @property
    def decoder(self) -> FullDecoder:
        return self._decoder

    def nats_by_sequence(self, batch: MicroBatch) -> torch.Tensor:
        """Negative log likelihood of each sequence's targets: float64 [S], with gradient where gradients are on."""
        flat = self._passes.lay_out(batch)
        self._most_tokens = max(self._most_tokens, len(flat.tokens))
        self.weights.refresh()
        if torch.is_grad_enabled():
            nats: torch.Tensor = _Nats.apply(self.matrices, self.vectors, self, flat)
            return nats
        by_target, _ = self._decoder.forward(flat, keeps=False)
        return sum_by_sequence(by_target, flat)

    def carry_back(self, upstream: Upstream, flat: FlatPass, kept: KeptFullPass) -> None:
        """The backward pass; `kept` is used up."""
        self._decoder.backward(upstream, flat, kept)

    def take_notices(self) -> list[str]:
        """What changed in how passes are made since the last time, for people."""
        return self._attention.take_notices() if isinstance(self._attention, AttentionChoice) else []

    def prepare_adding_up(self) -> str:
        """Have gradients of a step's passes add up in float32, between steps: a warning where that has no room."""
        if self._adds_up:
            return ""
        self._adds_up = True
        try:
            self.gradients.hold_in(torch.float32)
        except torch.OutOfMemoryError:
            return f"there is no memory for gradients in float32: {self._add_up_roughly()}"
        return ""

    def narrow_gradients(self) -> str:
        """Take the room of float32 gradients that no plan knew of back: how, in words; empty where there are none."""
        planned = torch.float32 if self._settings.accumulates else self._settings.compute_dtype
        if not self._adds_up or self.gradients.flat.dtype is planned:
            return ""
        self.gradients.hold_in(planned)
        return self._add_up_roughly()

    def _add_up_roughly(self) -> str:
        return f"gradients of a step's passes are rounded to {self._settings.compute_dtype} as they add up"

    def recompute_more(self) -> str:
        """Keep less of a pass from now on, with the same results: how, in words; empty where nothing more can be."""
        num_layers = len(self._decoder.blocks)
        more = step_down(self._recomputation, num_layers, may_slice=False)
        if more is None or (more.offload and not self._has_host_room(more)):
            return ""
        self._recomputation = more
        shelf = HostShelf(self._settings.device) if more.offload else None
        if self._decoder.shelf is not None:
            self._decoder.shelf.close()
        self._decoder = replace(self._decoder, levels=more.levels(num_layers), shelf=shelf)
        return more.describe(num_layers)

    def _has_host_room(self, way: Recomputation) -> bool:
        """Whether the host has memory to spare for what waits there, of the largest pass so far; a CPU's is its own."""
        row = self._decoder.embedding.shape[1] * self._settings.compute_dtype.itemsize
        needed = way.full_layers * place_bytes(self._most_tokens * row)
        # The shelf that there is goes before the next one is filled.
        needed -= 0 if self._decoder.shelf is None else self._decoder.shelf.held_bytes
        is_cpu = self._settings.device.type == "cpu"
        return is_cpu or needed + HOST_SPARE_BYTES <= host_memory.available_bytes()

    def release(self) -> None:
        """Let go of everything but the model's own parameters. A second time does nothing."""
        if not self._held:
            return
        if self._decoder.shelf is not None:
            self._decoder.shelf.close()
        del self._decoder, self.gradients
        self._held = []


class _Nats(torch.autograd.Function):
    """What autograd sees of it: a function of the trained weights, whose gradients it is not told."""

    @staticmethod
    def forward(
        context: Any, matrices: torch.Tensor, vectors: torch.Tensor, model: FullModel, flat: FlatPass
    ) -> torch.Tensor:
        by_target, kept = model._decoder.forward(flat, keeps=True)
        context.model, context.flat, context.kept = model, flat, kept
        return sum_by_sequence(by_target, flat)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, upstream: torch.Tensor) -> tuple[None, None, None, None]:
        model, flat = context.model, context.flat
        kept: KeptFullPass = context.kept
        context.kept = None
        # The gradient of a sum is one number, and says so: the host need not ask the device.
        is_one = len(upstream) == 1 or upstream.stride(0) == 0
        model.carry_back(
            Upstream(
                by_target=upstream.index_select(0, flat.sequences).float(),
                shared=upstream[:1].float() if is_one else None,
            ),
            flat,
            kept,
        )
        return None, None, None, None


@dataclass(frozen=True, kw_only=True)
class _Assembly:
    """Puts blocks together over the flat buffers."""

    causal: Any
    weights: FlatWeights
    gradients: Gradients
    operations: Any
    kernels: Any
    attention: Attention

    def assemble(self, groups: Any, recomputation: Recomputation, device: torch.device) -> FullDecoder:
        config, layers = self.causal.config, self.causal.model.layers
        shape = BlockShape(
            heads=config.num_attention_heads,
            key_value_heads=config.num_key_value_heads,
            head_dim=layers[0].self_attn.head_dim,
            epsilon=config.rms_norm_eps,
        )
        projections = [self._project(group) for group in groups]
        blocks = [
            self._block(layer, shape, projections[4 * number : 4 * number + 4]) for number, layer in enumerate(layers)
        ]
        table, norm = self.causal.model.embed_tokens.weight, self.causal.model.norm.weight
        matrix = self.causal.lm_head.weight
        head = FullHead(
            operations=self.operations,
            kernels=self.kernels,
            gradients=self.gradients,
            norm=self._working(norm),
            epsilon=config.rms_norm_eps,
            weight=self._working(matrix),
            norm_region=self.weights.region(norm),
            weight_region=self.weights.region(matrix),
            is_tied=matrix is table,
        )
        return FullDecoder(
            embedding=self._working(table),
            embedding_region=self.weights.region(table),
            blocks=blocks,
            head=head,
            gradients=self.gradients,
            kernels=self.kernels,
            levels=recomputation.levels(len(blocks)),
            shelf=HostShelf(device) if recomputation.offload else None,
        )

    def _working(self, parameter: torch.Tensor) -> torch.Tensor:
        return self.weights.region(parameter).view(self.weights.working)

    def _project(self, group: Any) -> FullProjection:
        weight = self.weights.joined([layer.weight for layer in group])
        biases = [layer.bias for layer in group if layer.bias is not None]
        if biases and len(biases) < len(group):
            raise WeightsNotSupported("of layers that read the same rows some have a bias and some have none")
        bias = self.weights.joined(biases) if biases else None
        return FullProjection(
            weight=weight.view(self.weights.working),
            bias=None if bias is None else bias.view(self.weights.working),
            weight_region=weight,
            bias_region=bias,
            gradients=self.gradients,
            operations=self.operations,
            kernels=self.kernels,
        )

    def _block(self, layer: Any, shape: BlockShape, projections: list[FullProjection]) -> FullBlock:
        first, second = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        of_heads = [norm.weight for norm in head_norms(layer) if norm is not None]
        attention_in, attention_out, mlp_in, mlp_out = projections
        return FullBlock(
            shape=shape,
            operations=self.operations,
            attention=self.attention,
            first_norm=self._working(first),
            second_norm=self._working(second),
            query_norm=self._working(of_heads[0]) if of_heads else None,
            key_norm=self._working(of_heads[1]) if of_heads else None,
            attention_in=attention_in,
            attention_out=attention_out,
            mlp_in=mlp_in,
            mlp_out=mlp_out,
            gradients=self.gradients,
            kernels=self.kernels,
            norm_regions=(self.weights.region(first), self.weights.region(second)),
            head_norm_regions=(self.weights.region(of_heads[0]), self.weights.region(of_heads[1]))
            if of_heads
            else None,
        )
