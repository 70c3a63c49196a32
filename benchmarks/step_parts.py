"""Where the milliseconds of a training step go on one GPU: parts by themselves, then whole steps with and without some.

Parts: the frozen products at a step's exact shapes (their sum is the ceiling), the adapters' products as they are made
and as plain products, attention's kernels, elementwise kernels, restoring of weights, also beside a product on another
stream. Steps: a profile by kernel family, the device's idle time, and what each change is worth.

    python -m benchmarks.step_parts --part gemm adapter attention elementwise steps --row dense mixed
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch

from benchmarks.gpu_training import Stepper, make_model, make_settings, make_steps
from benchmarks.random_models import SHAPES, Shape
from gpu_service.engine.failures import library_versions
from gpu_service.engine.fast_path import adapter_kernels, operations, torch_reference
from gpu_service.engine.fast_path.attention import Attention, Bounds, CudnnAttention, FlashAttention
from gpu_service.engine.fast_path.flat_adamw import FlatAdamW
from gpu_service.engine.fast_path.model import FastModel, FastSettings
from gpu_service.engine.fast_path.torch_reference import RankPart
from gpu_service.engine.training.accelerator import make_accelerator
from gpu_service.engine.training.flat_attention import FlatLayout

_RANK, _ROOM = 16, 64
_READ_AT_ONCE = "numbers read before the next step"
_MIXED = (1400, 900, 760, 640, 560, 500, 450, 410, 370, 330, 300, 270, 245, 215, 190, 165, 140, 120, 100, 75, 52)
# Kernel families by what their names contain, the first that fits.
_FAMILIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attention", ("flash", "fmha", "cudnn_generated", "sdpa")),
    ("dequantize", ("_nf4_dequantize", "kDequantize")),
    ("adapter", ("_adapter_backward", "_gate_adapter_backward", "_write_and_rank", "_reduce_")),
    ("loss", ("_cross_entropy",)),
    ("norm", ("_add_norm", "_norm_backward")),
    ("rotate", ("_rotate",)),
    ("gate", ("_gate",)),
    ("optimizer", ("adam", "multi_tensor", "_copy_out")),
    ("product", ("gemm", "nvjet", "cutlass", "splitK", "cublas")),
)


def clock(work: Callable[..., Any], *arguments: Any, repetitions: int = 12, **options: Any) -> float:
    """Median milliseconds of one call on the device."""
    for _ in range(3):
        work(*arguments, **options)
    make: Any = torch.cuda.Event
    events = [make(enable_timing=True) for _ in range(repetitions + 1)]
    events[0].record()
    for event in events[1:]:
        work(*arguments, **options)
        event.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(last) for first, last in pairwise(events))


def draw(*sizes: int) -> torch.Tensor:
    return torch.empty(*sizes, device="cuda", dtype=torch.bfloat16).normal_(std=0.05)


def groups(shape: Shape) -> Mapping[str, tuple[int, tuple[int, ...]]]:
    """K, and N of each layer, of the products of a block."""
    key_value = shape.key_value_heads * shape.head_dim
    return {
        "attention_in": (shape.hidden, (shape.hidden, key_value, key_value)),
        "attention_out": (shape.hidden, (shape.hidden,)),
        "mlp_in": (shape.hidden, (shape.intermediate, shape.intermediate)),
        "mlp_out": (shape.intermediate, (shape.hidden,)),
    }


def measure_gemm(shape: Shape, tokens: int) -> None:
    """Frozen products with margins, forward and backward, without what stands between them."""
    total, flops = 0.0, 0.0
    for name, (width, layers) in groups(shape).items():
        rows = sum(layers)
        matrix, x, gradient = draw(rows + _ROOM, width + _ROOM), draw(tokens, width + _ROOM), draw(tokens, rows + _ROOM)
        out, back = draw(tokens, rows + _ROOM)[:, :rows], draw(tokens, width)
        forward = clock(torch.mm, x, matrix[:rows].t(), out=out)
        backward = clock(torch.mm, gradient, matrix[:, :width], out=back)
        plain = clock(torch.mm, x[:, :width], matrix[:rows, :width].t(), out=out)
        one = 2e-9 * tokens * rows * width
        say(
            part="gemm",
            name=name,
            ms=[forward, backward],
            forward_without_margin_ms=plain,
            tflops=[one / forward, one / backward],
        )
        total += shape.layers * (forward + backward)
        flops += shape.layers * 2 * one
    weight, x = draw(shape.vocabulary, shape.hidden), draw(2048, shape.hidden)
    logits = draw(2048, shape.vocabulary)
    forward, backward = clock(torch.mm, x, weight.t(), out=logits), clock(torch.mm, logits, weight)
    one = 2e-9 * 2048 * shape.vocabulary * shape.hidden
    say(part="gemm", name="head", ms=[forward, backward], tflops=[one / forward, one / backward])
    total += tokens / 2048 * (forward + backward)
    flops += tokens / 2048 * 2 * one
    say(part="gemm", name="all of a step", ms=total, tflops=flops / total)


def measure_adapter(shape: Shape, tokens: int) -> None:
    """The adapters' products: in one pass, and as plain products. Milliseconds a block, and of all at the end."""
    sums: Counter[str] = Counter()
    for name, (width, layers) in groups(shape).items():
        rows = sum(layers)
        wide_x, wide = draw(tokens, width + _ROOM), draw(tokens, rows + _ROOM)
        x, ranks = wide_x[:, :width], wide_x[:, width:]
        gradient, inner, right, below = wide[:, :rows], wide[:, rows:], draw(rows, _ROOM), draw(_ROOM, width)
        flat, all_a = draw(rows * _RANK), draw(len(layers) * _RANK, width)
        plain = adapter_kernels.prepare_ranks(_parts(layers), **_ranks_of(x)).reference
        took = {
            "products": clock(torch_reference.adapter_backward, gradient, right, ranks, inner, plain, flat),
            "inner_alone": clock(torch.mm, gradient, right, out=inner),
            "of_a": clock(torch.mm, inner[:, : all_a.shape[0]].t(), x, out=all_a),
            "x_a": clock(torch.mm, x, below.t(), out=ranks),
        }
        for columns, block, warps in ((256, 64, 8), (128, 64, 4), (256, 32, 4), (512, 32, 8)):
            with replaced(adapter_kernels, _SLAB_COLUMNS={16: columns}, _BLOCK_ROWS=block, _WARPS=warps):
                ours = adapter_kernels.prepare_ranks(_parts(layers), **_ranks_of(x))
                one = clock(adapter_kernels.adapter_backward, gradient, right, ranks, inner, ours, flat)
            took[f"one_pass {columns}x{block}w{warps}"] = one
        say(part="adapter", name=name, **took)
        sums.update({kind: value * shape.layers for kind, value in took.items()})
        if name == "mlp_in":
            measure_gates(tokens, shape, wide, right, ranks, flat)
    say(part="adapter", name="all of a step", **sums)


def _parts(layers: tuple[int, ...]) -> list[RankPart]:
    return [
        RankPart(first_row=sum(layers[:n]), num_rows=size, first_rank=n * _RANK, start_b=sum(layers[:n]) * _RANK)
        for n, size in enumerate(layers)
    ]


def _ranks_of(x: torch.Tensor) -> dict[str, Any]:
    return {"rank": _RANK, "room": _ROOM, "scaling": 1.0, "device": x.device}


def measure_gates(
    tokens: int, shape: Shape, wide: torch.Tensor, right: torch.Tensor, ranks: torch.Tensor, flat: torch.Tensor
) -> None:
    """Gates: their kernels alone, and with the products in them, for several sizes of block."""
    kernels, width = operations.operations_for(wide.device), shape.intermediate
    gate_up, inner, of_gated = wide[:, : 2 * width], wide[:, 2 * width :], draw(tokens, width)
    below, gated = draw(_ROOM, width), draw(tokens, width + _ROOM)
    say(
        part="adapter",
        name="gates alone",
        forward=clock(kernels.gate, gate_up, gated[:, :width]),
        x_a=clock(torch.mm, gated[:, :width], below.t(), out=gated[:, width:]),
        backward=clock(kernels.gate_backward_, of_gated, gate_up),
    )
    for columns, rows, warps in ((256, 16, 8), (128, 32, 8), (128, 16, 4), (128, 32, 4), (64, 64, 8)):
        with replaced(adapter_kernels, _GATE_SLAB_COLUMNS={16: columns}, _GATE_BLOCK_ROWS=rows, _GATE_WARPS=warps):
            prepared = adapter_kernels.prepare_ranks(_parts((width, width)), **_ranks_of(wide))
            one = clock(kernels.gate_adapter_backward_, of_gated, gate_up, right, ranks, inner, prepared, flat)
        say(part="adapter", name=f"gate backward and products {columns}x{rows}w{warps}", one_pass=one)


def measure_attention(shape: Shape, tokens: int) -> None:
    """Forward, and forward with backward, a block."""
    for row, lengths in (("dense", (2048,) * (tokens // 2048)), ("mixed", _MIXED)):
        first_value = shape.heads + shape.key_value_heads
        heads = draw(sum(lengths), (first_value + shape.key_value_heads) * shape.head_dim)
        heads = heads.view(sum(lengths), -1, shape.head_dim)
        parts = [heads[:, : shape.heads], heads[:, shape.heads : first_value], heads[:, first_value:]]
        starts = torch.tensor([0, *accumulate(lengths)], device="cuda", dtype=torch.int32)
        bounds = Bounds(starts=starts, longest=max(lengths), layout=FlatLayout(lengths=lengths))
        for kind in (FlashAttention(), CudnnAttention()) if row == "dense" else (FlashAttention(),):
            say(
                part="attention",
                row=row,
                kind=type(kind).__name__,
                forward_ms=clock(kind.forward, *parts, bounds),
                both_ms=clock(_attend_and_return, kind, *parts, bounds),
            )


def _attend_and_return(kind: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, b: Bounds) -> None:
    output, kept = kind.forward(query, key, value, b)
    kind.backward(output, query, key, value, output, kept, b)


def measure_elementwise(shape: Shape, tokens: int) -> None:
    """Norms, rotation, restoring, and restoring beside a product on a stream of its own."""
    kernels = operations.operations_for(torch.device("cuda"))
    x, add, out = draw(tokens, shape.hidden), draw(tokens, shape.hidden), draw(tokens, shape.hidden + _ROOM)
    weight, scale, inside = draw(shape.hidden), torch.rand(tokens, device="cuda"), out[:, : shape.hidden]
    say(
        part="elementwise",
        norm_ms=clock(kernels.add_norm, x, add, weight, 1e-5, inside),
        norm_backward_ms=clock(kernels.norm_backward_, add, x, weight, scale, inside, adds=True),
        copy_ms=clock(inside.copy_, x),
    )
    rows = 2 * shape.intermediate
    packed = torch.randint(0, 255, (rows * shape.hidden // 2, 1), device="cuda", dtype=torch.uint8)
    scales = torch.randint(0, 255, (rows * shape.hidden // 64,), device="cuda", dtype=torch.uint8)
    codes, nested = torch.rand(16, device="cuda"), torch.rand(256, device="cuda")
    nested_scales, offset = torch.rand(scales.numel() // 256, device="cuda"), torch.rand((), device="cuda")
    place = draw(rows + _ROOM, shape.hidden + _ROOM)[:rows, : shape.hidden]
    arguments = (packed, codes, scales, nested, nested_scales, offset, place)
    took = clock(kernels.nf4_dequantize, *arguments)
    say(part="elementwise", restore_ms=took, restore_tb_s=rows * shape.hidden * (0.5 + 2 + 1 / 64) / took / 1e9)
    other, wide, result = draw(rows, shape.hidden), draw(tokens, shape.hidden), draw(tokens, rows)
    alone = clock(torch.mm, wide, other.t(), out=result)
    for priority in (0, -1):
        make: Any = torch.cuda.Stream
        side = make(priority=priority)

        def beside(side: Any = side) -> None:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                kernels.nf4_dequantize(*arguments)
            torch.mm(wide, other.t(), out=result)
            torch.cuda.current_stream().wait_stream(side)

        say(part="elementwise", priority=priority, product_ms=alone, with_restore_beside_ms=clock(beside))


def measure_steps(arguments: argparse.Namespace) -> None:
    """Whole steps: as trained, and with one change undone at a time."""
    shape, settings = SHAPES[arguments.shape], make_settings(argparse.Namespace(recompute=False))
    device = torch.device("cuda", 0)
    accelerator = make_accelerator(device, torch.bfloat16)
    began = time.perf_counter()
    model = make_model(shape, "nf4", settings)
    fast = FastModel(
        model, FastSettings(device=device, compute_dtype=torch.bfloat16, keeps_weights=False, records=False)
    )
    optimizer = accelerator.prepare(FlatAdamW(fast.flat_adapter, settings.optimizer))
    stepper = Stepper(accelerator=accelerator, model=fast, optimizer=optimizer, settings=settings)
    fast.train()
    say(part="steps", made_in_seconds=time.perf_counter() - began)
    kernels = operations.operations_for(device)
    changes: dict[str, dict[str, Any]] = {
        "all adapters' products apart": {
            "adapter_backward": _adapter_products,
            "gate_adapter_backward_": _gates_then_products,
        },
        "as trained": {},
        "gates' products in a pass of their own": {"gate_adapter_backward_": _gates_then_one_pass},
    }
    for row in arguments.row:
        batches = make_steps(row, arguments.tokens, 8, shape.vocabulary, seed=1)
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in (*changes, _READ_AT_ONCE)}
        # In turns: what comes first runs on the coolest card.
        for _ in range(arguments.turns):
            for name, change in changes.items():
                with replaced(kernels, **change):
                    turns[name].append(rates(stepper, batches))
            with replaced(stepper.updates, steps_ahead=0):
                turns[_READ_AT_ONCE].append(rates(stepper, batches))
        for name, found in turns.items():
            say(part="steps", row=row, change=name, **{key: [one[key] for one in found] for key in found[0]})
        say(part="profile", row=row, **profile(stepper, batches[:3]))
    say(part="steps", peak_gib=torch.cuda.max_memory_allocated() / 2**30)


def _adapter_products(gradient: Any, right: Any, ranks: Any, inner: Any, prepared: Any, gradients: Any) -> None:
    torch_reference.adapter_backward(gradient, right, ranks, inner, prepared.reference, gradients)


def _gates_then_products(of_gated: torch.Tensor, gate_up: torch.Tensor, *others: Any) -> None:
    operations.operations_for(gate_up.device).gate_backward_(of_gated, gate_up)
    _adapter_products(gate_up, *others)


def _gates_then_one_pass(of_gated: torch.Tensor, gate_up: torch.Tensor, *others: Any) -> None:
    operations.operations_for(gate_up.device).gate_backward_(of_gated, gate_up)
    adapter_kernels.adapter_backward(gate_up, *others)


def rates(stepper: Stepper, batches: list[Any]) -> dict[str, float]:
    """Of one round through the batches, once it is warm."""
    list(stepper.run(batches[:3]))
    torch.cuda.synchronize()
    began = time.perf_counter()
    seconds = [numbers.seconds for _, numbers in stepper.run(batches)]
    wall = time.perf_counter() - began
    tokens = [batch.num_tokens for batch in batches]
    return {
        "ms": 1000 * statistics.median(seconds),
        "tokens_per_second": statistics.median(n / one for n, one in zip(tokens, seconds, strict=True)),
        "overall": sum(tokens) / wall,
    }


def profile(stepper: Stepper, batches: list[Any]) -> dict[str, Any]:
    """Milliseconds a step by family; the time in which no kernel ran; the largest kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        list(stepper.run(batches))
        torch.cuda.synchronize()
    steps = len(batches)
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.time_range.elapsed_us() > 0
    )
    busy, last = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    families: dict[str, float] = {}
    rows = [(one.self_device_time_total / 1000 / steps, one.count / steps, one.key) for one in profiler.key_averages()]
    for milliseconds, _, name in rows:
        family = next((kind for kind, words in _FAMILIES if any(word in name for word in words)), "other")
        families[family] = families.get(family, 0.0) + milliseconds
    rows.sort(reverse=True)
    return {
        "wall": (last - spans[0][0]) / 1000 / steps,
        "idle": (last - spans[0][0] - busy) / 1000 / steps,
        "launches": sum(row[1] for row in rows),
        "families": {name: round(value, 2) for name, value in sorted(families.items(), key=lambda one: -one[1])},
        "kernels": [[round(ms, 2), round(count), name[:76]] for ms, count, name in rows[:28]],
    }


@contextmanager
def replaced(module: Any, **values: Any) -> Iterator[None]:
    """Inside, attributes of a module are others."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def say(**values: Any) -> None:
    print(json.dumps({name: _shorten(value) for name, value in values.items()}), flush=True)


def _shorten(value: Any) -> Any:
    if isinstance(value, list):
        return [_shorten(one) for one in value]
    return round(value, 3) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {
        "gemm": measure_gemm,
        "adapter": measure_adapter,
        "attention": measure_attention,
        "elementwise": measure_elementwise,
    }
    parser.add_argument("--part", nargs="+", choices=(*parts, "steps"), default=[*parts, "steps"])
    parser.add_argument("--row", nargs="+", choices=("dense", "mixed"), default=["dense", "mixed"])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="3B")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    say(part="device", device=torch.cuda.get_device_name(0), versions=dict(library_versions()))
    for name in arguments.part:
        if name == "steps":
            measure_steps(arguments)
        else:
            parts[name](SHAPES[arguments.shape], arguments.tokens)


if __name__ == "__main__":
    main()
