"""What an engine writes while it trains, by its own keeper of checkpoints, and what a later attempt makes of it.

Needs torch. Tensors are written by native code, so nothing of them is synced before the product syncs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gpu_service.engine.failures import RunFailure
from gpu_service.engine.reporter import Reporter
from gpu_service.engine.training import checkpoint
from gpu_service.engine.training.certificate import Certificate, Environment, measure
from gpu_service.engine.training.checkpoint_keeper import CheckpointKeeper
from gpu_service.engine.training.progress import TrainingProgress
from gpu_service.journal import Writer as JournalWriter
from gpu_service.journal import summarize
from tests.faults.power_loss.harness import Acknowledged, Writer
from tunesmith.common.v1 import training_spec_pb2

_IDENTITY = checkpoint.Identity(data_digest="d", spec_digest="s", weights_digest="w", training_type="full", num_steps=8)
_CPU = torch.device("cpu")
_STEPS = (2, 4, 6)


class _Keeper(CheckpointKeeper):
    """The product's, but for the probe: there is no data to measure a loss on."""

    def _measure(self) -> Certificate:
        return _certify(self.model, self.optimizer)


def _certify(model: Any, optimizer: Any) -> Certificate:
    environment = Environment.here(device=_CPU, compute_dtype="float32", quantization="none")
    return measure(model=model, optimizer=optimizer, probe_loss=1.0, environment=environment)


def _trainer() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
    model = torch.nn.Linear(4, 4)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def _train(root: Path, acknowledge: Acknowledged) -> None:
    model, optimizer = _trainer()
    data: Any = None
    with JournalWriter.open(root / "journal", 1) as journal:
        keeper = _Keeper(
            directory=root / "checkpoints",
            identity=_IDENTITY,
            settings=training_spec_pb2.Hyperparameters(keep_checkpoints=1),
            model=model,
            unwrapped_model=model,
            optimizer=optimizer,
            scaler=None,
            data=data,
            objective=data,
            device=_CPU,
            reporter=Reporter(run_directory=root, writer=journal, notify=lambda _message: None),
        )
        for step in _STEPS:
            model(torch.ones(4)).sum().backward()
            optimizer.step()
            keeper.save(TrainingProgress(steps_done=step))
            acknowledge(f"saved:{step}")


def _problems(root: Path, acknowledged: frozenset[str]) -> Iterator[str]:
    told = summarize(root / "journal").last_checkpoint
    saved = max((int(what.partition(":")[2]) for what in acknowledged), default=0)
    if told is None or told.step < saved:
        if saved:
            yield f"step {saved} was saved, the journal tells of {told.step if told else 'none'}"
        return
    model, optimizer = _trainer()
    try:
        restored = checkpoint.restore(
            root / "checkpoints" / told.name,
            identity=_IDENTITY,
            model=model,
            optimizer=optimizer,
            scaler=None,
            device=_CPU,
            measure=lambda: _certify(model, optimizer),
        )
    except RunFailure as failure:
        yield f"{told.name} was told of and cannot be gone on from: {failure.failure.message}"
    else:
        if restored.progress.steps_done != told.step:
            yield f"{told.name} goes on from step {restored.progress.steps_done}"


ENGINE_WRITERS: tuple[Writer, ...] = (
    Writer(name="engine-checkpoints", promise="R19", act=_train, problems=_problems, can_be_killed=False),
)
