"""Makes an engine ready before it has a run: the device's context, its kernels, and what is imported at first use.

It loads a model of one small layer as a run loads its base, puts an adapter on it, and makes steps. Kernels are
compiled for the sizes of a model, so it makes the same steps with layers as large as those of a model that is likely to
be wanted, of zeros. Nothing of either is kept, and nothing that a run finds (random states, what is on the shelf)
comes from them. Stops between its parts as soon as there is work, which then pays for the rest itself.
"""

from __future__ import annotations

import gc
import json
import logging
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file

from gpu_service.domain.defaults import DEFAULT_LORA_RANK
from gpu_service.domain.device import Device as PlannedDevice
from gpu_service.domain.planned_data import Example, ExampleReference, PlannedData
from gpu_service.domain.quantizer import OWN
from gpu_service.engine import devices
from gpu_service.engine.devices import Device
from gpu_service.engine.failures import RunFailure
from gpu_service.engine.fast_path import kernel_problems
from gpu_service.engine.fast_path.nf4 import name_quantizer
from gpu_service.engine.lean import choice
from gpu_service.engine.lean import shell as lean_shell
from gpu_service.engine.lean.config import LeanConfig, TakesTheLibrary
from gpu_service.engine.loading import Loaded, LoadRequest, load
from gpu_service.engine.loading import places as places_of
from gpu_service.engine.loading import tokenizer as stage_tokenizer
from gpu_service.engine.loading.work import KeptTokenizers
from gpu_service.engine.precision import DTYPES
from gpu_service.engine.request import DeviceChoice
from gpu_service.engine.stopping import StopSwitch
from gpu_service.engine.trainers import make_trainer
from gpu_service.engine.training.batches import collate
from gpu_service.engine.training.objectives import make_objective
from tunesmith.common.v1 import plan_pb2, training_spec_pb2

_LOG = logging.getLogger(__name__)
_HIDDEN, _INTERMEDIATE, _HEADS, _KEY_VALUE_HEADS, _VOCABULARY = 256, 512, 4, 2, 512
_LINEARS = {
    "self_attn.q_proj": (_HIDDEN, _HIDDEN),
    "self_attn.k_proj": (_HIDDEN // 2, _HIDDEN),
    "self_attn.v_proj": (_HIDDEN // 2, _HIDDEN),
    "self_attn.o_proj": (_HIDDEN, _HIDDEN),
    "mlp.gate_proj": (_INTERMEDIATE, _HIDDEN),
    "mlp.up_proj": (_INTERMEDIATE, _HIDDEN),
    "mlp.down_proj": (_HIDDEN, _INTERMEDIATE),
}
_NORMS = ("input_layernorm", "post_attention_layernorm")
# The first layer has nothing before it to add or to pass gradients to, and the others have.
_LAYERS = 2
# Tokens of the two sequences of each step: kernels tell multiples of 16 from other numbers.
_LENGTHS = ((96, 160), (96, 160), (95, 156))


class _Wanted(Exception):
    """There is work."""


@dataclass(kw_only=True)
class _Pace:
    """Takes the place of a run's reporter and switch: says nothing, and stops when there is work."""

    is_wanted: Callable[[], bool]
    loading_stage: str = ""

    def emit(self, message: object) -> None:
        del message
        self.check()

    def check(self) -> None:
        if self.is_wanted():
            raise _Wanted


class _Rows:
    """Two examples in memory, in place of planned data."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._examples = [
            Example(
                tokens=memoryview(array("i", (number % _VOCABULARY for number in range(length)))),
                mask=memoryview(b"\0" + b"\1" * (length - 1)),
            )
            for length in lengths
        ]

    def example(self, reference: ExampleReference) -> Example:
        return self._examples[reference.example_index]


def make_ready(device_id: str, is_wanted: Callable[[], bool], model_directory: Path | None = None) -> str | None:
    """Make the engine ready for runs on a device (`cuda:0`, `cpu:-1`), or until `is_wanted`.

    `model_directory`: a base for whose sizes kernels are to be compiled. Gives why kernels cannot be compiled; empty
    where they were, None where that is not known.
    """
    start = time.monotonic()
    kind, _, index = device_id.partition(":")
    device = devices.select(DeviceChoice(type=kind, index=int(index)))
    pace = _Pace(is_wanted=is_wanted)
    problem: str | None = None
    try:
        with tempfile.TemporaryDirectory(prefix="warm-up-") as name:
            pace.check()
            _touch(device)
            pace.check()
            if _has_kernels(device) and name_quantizer() == OWN:
                _write_model(Path(name))
                _train(Path(name), device, pace)
                problem = ""
                if model_directory is not None and device.torch_device.type == "cuda":
                    _train_alike(model_directory, device, pace)
    except _Wanted:
        _LOG.info("warm-up left for a run after %.1f s", time.monotonic() - start)
    except torch.OutOfMemoryError as error:
        # Somebody else's work fills the device; a run is told of that in its own words.
        _LOG.warning("warm-up found no memory: %s", error)
    except kernel_problems.errors() as error:
        # Runs of this engine are planned without them, and say so.
        problem = kernel_problems.describe(error)
        _LOG.warning("warm-up was not finished, kernels cannot be compiled: %s: %s", type(error).__name__, error)
    except (RunFailure, OSError, RuntimeError, ImportError) as error:
        # Without room for files there are still runs that can be carried out; what a run needs it misses in its own
        # words. A device that is lost says so once more below, and ends the engine.
        _LOG.warning("warm-up was not finished: %s: %s", type(error).__name__, error)
    else:
        _LOG.info("warm after %.1f s", time.monotonic() - start)
    gc.collect()
    device.give_back()
    return problem


def read_tokenizer(model_directory: Path, tokenizers: KeptTokenizers) -> None:
    """Keep the tokenizer of a model, if it can be read; what is wrong with it is for a run to say.

    Imports transformers.
    """
    from transformers import AutoConfig, AutoTokenizer

    start = time.monotonic()
    try:
        config = AutoConfig.from_pretrained(model_directory, trust_remote_code=False, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(
            model_directory, config=config, trust_remote_code=False, local_files_only=True
        )
        tokenizers.put(model_directory, tokenizer)
    except stage_tokenizer.RAISES as error:
        _LOG.info("no tokenizer was read ahead: %s", error)
    else:
        _LOG.info("a tokenizer was read ahead in %.1f s", time.monotonic() - start)


def _touch(device: Device) -> None:
    """The context, and the library that multiplies."""
    device.make_current()
    # An older GPU trains in float32, and may not multiply bfloat16 at all.
    dtype = torch.bfloat16 if _has_kernels(device) else torch.float32
    one = torch.ones(256, 256, device=device.torch_device, dtype=dtype)
    (one @ one).sum().item()


def _has_kernels(device: Device) -> bool:
    """Whether runs take the fast path there; an older GPU has no use for its kernels, and may not compile them."""
    return PlannedDevice.from_json(device.describe()).has_kernels


def _write_model(directory: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": _HIDDEN,
        "intermediate_size": _INTERMEDIATE,
        "num_hidden_layers": 1,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KEY_VALUE_HEADS,
        "head_dim": _HIDDEN // _HEADS,
        "vocab_size": _VOCABULARY,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "eos_token_id": 0,
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    # Never read: the run would read it when it saves.
    (directory / "tokenizer.json").write_text("{}", encoding="utf-8")
    tensors = {f"model.layers.0.{name}.weight": torch.zeros(sizes) for name, sizes in _LINEARS.items()}
    tensors |= {f"model.layers.0.{name}.weight": torch.ones(_HIDDEN) for name in _NORMS}
    tensors |= {"model.embed_tokens.weight": torch.ones(_VOCABULARY, _HIDDEN), "model.norm.weight": torch.ones(_HIDDEN)}
    save_file(
        {name: value.to(torch.bfloat16) for name, value in tensors.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )


def _train(directory: Path, device: Device, pace: _Pace) -> None:
    settings = _settings(device)
    plan = plan_pb2.Plan(resolved=settings, num_covered_linears=len(_LINEARS))
    made_with = choice.builders(plan)
    loaded = Loaded()
    load(
        LoadRequest(
            model_directory=directory,
            base_model="warm/up",
            weights_digest="",
            plan=plan,
            family=made_with.family,
            quantization=made_with.quantization,
            method=made_with.method,
            is_lean=True,
            compute_dtype=DTYPES[settings.quantization.compute_dtype],
            device=device.torch_device,
            # A run's base may come in by bitsandbytes; ours has kernels to be compiled.
            quantizer=OWN,
        ),
        loaded,
        switch=StopSwitch(pace.check),
        reporter=pace,
    )
    _step(loaded.model, settings, device, pace)


def _train_alike(model_directory: Path, device: Device, pace: _Pace) -> None:
    """The same on two layers of the sizes of a model, whose weights are not read."""
    pace.check()
    try:
        config = replace(LeanConfig.read(model_directory), num_hidden_layers=_LAYERS)
    except (OSError, TakesTheLibrary) as error:
        _LOG.info("no kernels are compiled for %s: %s", model_directory.name, error)
        return
    settings = _settings(device)
    plan = plan_pb2.Plan(resolved=settings)
    made_with = choice.builders(plan)
    request = LoadRequest(
        model_directory=model_directory,
        base_model="warm/up",
        weights_digest="",
        plan=plan,
        family=made_with.family,
        quantization=made_with.quantization,
        method=made_with.method,
        is_lean=True,
        compute_dtype=DTYPES[settings.quantization.compute_dtype],
        device=device.torch_device,
    )
    base = lean_shell.build(request, Loaded(config=config), places_of.make_zeros(request, config))
    pace.check()
    _step(made_with.method.attach(base, "warm/up", settings), settings, device, pace)


def _settings(device: Device) -> training_spec_pb2.Hyperparameters:
    """Those that a project has which asks for nothing else."""
    dtype = "bfloat16" if device.torch_device.type == "cuda" else "float32"
    targets = [name.rpartition(".")[2] for name in _LINEARS]
    return training_spec_pb2.Hyperparameters(
        quantization=training_spec_pb2.Quantization(method="nf4", double_quantization=True, compute_dtype=dtype),
        lora=training_spec_pb2.Lora(rank=DEFAULT_LORA_RANK, alpha=DEFAULT_LORA_RANK, target_modules=targets),
        optimizer=training_spec_pb2.Optimizer(
            name="adamw", learning_rate=1e-4, beta1=0.9, beta2=0.999, epsilon=1e-8, max_gradient_norm=1.0
        ),
        trainer="fast",
    )


def _step(model: Any, settings: training_spec_pb2.Hyperparameters, device: Device, pace: _Pace) -> None:
    trainer = make_trainer(model, settings, device.torch_device)
    try:
        objective = make_objective(settings)
        trainer.model.train()
        # From the second on the optimizer has its state.
        for lengths in _LENGTHS:
            pace.check()
            batch = collate(cast(PlannedData, _Rows(lengths)), [ExampleReference(0, n) for n in range(len(lengths))])
            outcome = objective.forward(trainer.model, batch.to(device.torch_device))
            trainer.accelerator.backward(outcome.total)
            trainer.accelerator.clip_grad_norm_(list(trainer.model.parameters()), 1.0).item()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad(set_to_none=True)
    finally:
        trainer.release()
