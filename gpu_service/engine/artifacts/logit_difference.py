"""How far an export's logits are from the adapter's on the fixed prompts. Judges nothing; the caller has the threshold.

Export and reference are computed alike: weights as they lie in their files, float32, read layer by layer as the forward
pass needs them, so that no second model is ever in memory. The reference is the base's original weights with the
adapter applied unmerged: the difference is what merging did, rounding to 16 bits included. A second one, against the
model that the run had, adds what quantization did to the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from gpu_service.engine.artifacts import fixed_prompts
from gpu_service.engine.artifacts.export_source import ExportSource
from gpu_service.engine.loading.config import read_config
from gpu_service.engine.pace import each_module
from gpu_service.engine.training.modes import measuring

_DISK = "disk"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Over all positions of all prompts. Differences are absolute, of raw logits."""

    max_difference: float
    mean_difference: float
    num_same_top_tokens: int
    num_positions: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An export beside the adapter on the original base, and beside the model as the run had it."""

    num_prompts: int
    adapter: Difference
    trained: Difference


def compare(source: ExportSource, exported: Path, check: Callable[[], None]) -> Comparison:
    """Compare the model in `exported` with what it was made from; `check` may raise to stop between passes.

    Raises what transformers raises for a directory that it cannot load.
    """
    prompts = fixed_prompts.tokenize(source.tokenizer)
    with measuring(source.model), each_module(check):
        trained = _logits(source.model, prompts, source.device)
    check()
    reference = _load_streamed(source, source.model_directory)
    with torch.no_grad(), _adapter_applied(reference, source), each_module(check):
        unmerged = _logits(reference, prompts, source.device)
    del reference
    check()
    with torch.no_grad(), each_module(check):
        merged = _logits(_load_streamed(source, exported), prompts, source.device)
    return Comparison(
        num_prompts=len(prompts), adapter=_difference(merged, unmerged), trained=_difference(merged, trained)
    )


def _load_streamed(source: ExportSource, directory: Path) -> Any:
    """The model of a directory in float32, whose matrices stay on the disk until a forward pass asks for them."""
    config = read_config(directory, source.family)
    with init_empty_weights():
        skeleton = source.family.MODEL_CLASS(config)
    blocks = set(skeleton._no_split_modules or ())
    places = dict(_place(skeleton, "", str(source.device), blocks))
    model = source.family.MODEL_CLASS.from_pretrained(
        directory, config=config, dtype=torch.float32, device_map=places, use_safetensors=True
    )
    return model.eval()


def _place(module: torch.nn.Module, path: str, device: str, blocks: set[str]) -> Iterator[tuple[str, str]]:
    """Where each part goes: decoder layers and whatever holds a matrix to the disk, the small rest to the device."""
    own = list(module.parameters(recurse=False))
    children = list(module.named_children())
    if type(module).__name__ in blocks or any(parameter.ndim > 1 for parameter in own):
        yield path, _DISK
    elif own or not children:
        yield path, device
    else:
        for name, child in children:
            yield from _place(child, f"{path}.{name}" if path else name, device, blocks)


@contextmanager
def _adapter_applied(model: Any, source: ExportSource) -> Iterator[None]:
    """The adapter's matrices beside the layers that they cover, as forward hooks."""
    modules = dict(model.named_modules())
    handles = []
    try:
        for layer in source.layers:

            def add(module: Any, inputs: Any, outputs: Any, layer: Any = layer) -> Any:
                return layer.apply(inputs[0], outputs)

            handles.append(modules[layer.path].register_forward_hook(add))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _logits(model: Any, prompts: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Logits at every position of every prompt, [positions, vocabulary] in float32 on the CPU; one padded pass."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
        mask[row, : len(prompt)] = 1
    logits = model(input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False).logits
    kept: torch.Tensor = logits.float().cpu()[mask.bool()]
    return kept


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> Difference:
    apart = (found - wanted).abs()
    return Difference(
        max_difference=float(apart.max()),
        mean_difference=float(apart.mean(dtype=torch.float64)),
        num_same_top_tokens=int((found.argmax(-1) == wanted.argmax(-1)).sum()),
        num_positions=found.shape[0],
    )
