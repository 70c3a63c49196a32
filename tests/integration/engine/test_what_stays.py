"""What outlives a training in the process or on disk: a base that is as it was, and checkpoints that are whole."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gpu_service.engine.builders.methods import lora
from gpu_service.engine.failures import RunFailure
from gpu_service.engine.training import checkpoint, random_state
from gpu_service.engine.training.certificate import Certificate, Environment, measure
from gpu_service.engine.training.progress import TrainingProgress
from tests.fakes.engine_runs import Workspace
from tests.fakes.tiny_models import TinyOptions
from tunesmith.common.v1 import errors_pb2, training_spec_pb2

_IDENTITY = checkpoint.Identity(data_digest="d", spec_digest="s", weights_digest="w", training_type="lora", num_steps=9)


def test_a_base_comes_back_as_it_was(workspace: Workspace) -> None:
    """An adapter with recomputed activations leaves no layer, no switch and no hook on the base that is kept."""
    name = workspace.place_model(TinyOptions())
    base = AutoModelForCausalLM.from_pretrained(workspace.models_directory / name, dtype=torch.float32)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    hyperparameters = training_spec_pb2.Hyperparameters(
        gradient_checkpointing=True,
        lora=training_spec_pb2.Lora(rank=4, alpha=8, target_modules=["q_proj", "down_proj"]),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = lora.attach(base, name, hyperparameters)
        assert any(getattr(module, "gradient_checkpointing", False) for module in base.modules())
        model.train()(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
        kept = lora.detach(model)

    after = kept.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in kept.modules())
    assert not any(module._forward_hooks for module in kept.modules())
    # The switch's old name is not used where the library has another; PEFT still reads the old property.
    assert not [str(entry.message) for entry in caught if "gradient_checkpointing_" in str(entry.message)]


def _trainer() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
    model = torch.nn.Linear(4, 4)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def _certify(model: Any, optimizer: Any) -> Certificate:
    environment = Environment.here(device=torch.device("cpu"), compute_dtype="float32", quantization="none")
    return measure(model=model, optimizer=optimizer, probe_loss=1.0, environment=environment)


def _save(directory: Path, model: Any, optimizer: Any, scaler: Any = None) -> checkpoint.Checkpoint:
    return checkpoint.save(
        directory,
        identity=_IDENTITY,
        certificate=_certify(model, optimizer),
        held_out=checkpoint.HeldOut(loss=None, best=False),
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        progress=TrainingProgress(steps_done=1),
        device=torch.device("cpu"),
        trainer="reference",
    )


def test_the_scale_of_gradients_is_kept(tmp_path: Path) -> None:
    """In float16 the scale is found by trying; a resumed run that began again would skip steps that the first took."""
    model, optimizer = _trainer()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for _ in range(3):
        scaler.scale(model(torch.ones(4)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    saved = _save(tmp_path, model, optimizer, scaler)
    other, other_optimizer = _trainer()
    fresh = torch.amp.GradScaler("cpu", growth_interval=2)
    restored = checkpoint.restore(
        tmp_path / saved.name,
        identity=_IDENTITY,
        model=other,
        optimizer=other_optimizer,
        scaler=fresh,
        device=torch.device("cpu"),
        measure=lambda: _certify(other, other_optimizer),
    )

    assert restored.saved == restored.measured
    assert fresh.state_dict() == scaler.state_dict()
    assert fresh.get_scale() == 2048.0
    assert torch.equal(other.weight, model.weight)


def test_a_training_goes_on_upon_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn there goes on too: the state of the run's own device moves with it, and of no other."""
    states = {index: torch.full((16,), index, dtype=torch.uint8) for index in range(3)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device.index].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device.index: state}))

    captured = random_state.capture(torch.device("cuda", 1))
    random_state.restore(*captured, torch.device("cuda", 2))
    assert [state[0].item() for state in states.values()] == [0, 1, 1]
    # A host without a device takes what it has.
    random_state.restore(*captured, torch.device("cpu"))


def test_a_checkpoint_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = _trainer()

    def fail(device: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(random_state, "capture", fail)
    with pytest.raises(RunFailure) as caught:
        _save(tmp_path / "checkpoints", model, optimizer)

    assert caught.value.failure.reason == errors_pb2.ERROR_REASON_DISK_FULL
    assert list((tmp_path / "checkpoints").iterdir()) == []
