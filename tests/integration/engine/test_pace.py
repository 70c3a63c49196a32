"""Work on big files and models gives signs of progress in its midst."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from gpu_service.engine.pace import each_module
from gpu_service.engine.resident import BaseShelf
from gpu_service.engine.service import carry_out
from gpu_service.engine.stopping import StopSwitch
from tests.fakes.engine_runs import Workspace, read_log


def test_each_module_that_a_model_passes_is_a_sign_and_a_place_to_stop() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    signs: list[int] = []
    with each_module(lambda: signs.append(1)):
        model(torch.ones(1, 2))
    assert len(signs) == 3
    model(torch.ones(1, 2))
    assert len(signs) == 3

    def stop() -> None:
        raise KeyError

    with pytest.raises(KeyError), each_module(stop):
        model(torch.ones(1, 2))
    model(torch.ones(1, 2))


def test_a_run_announces_what_it_writes_and_reads_in_one_piece(workspace: Workspace) -> None:
    signs: list[str] = []

    def train(directory: Any) -> list[float]:
        pauses: list[float] = []

        def announce(seconds: float) -> None:
            signs.append("pause")
            pauses.append(seconds)

        switch = StopSwitch(lambda: signs.append("progress"), announce)
        carry_out(directory, shelf=BaseShelf(), switch=switch, notify=lambda notice: None)
        log = read_log(directory)
        assert log.states[-1] == "SUCCEEDED", log.payloads[-1]
        return pauses

    hyperparameters = {"num_steps": 2, "save_every_steps": 1, "keep_checkpoints": 3}
    whole = workspace.make_run("paced", training_type="lora", hyperparameters=hyperparameters)
    first = train(whole)
    rest = workspace.make_run(
        "paced",
        training_type="lora",
        hyperparameters=hyperparameters,
        attempt=2,
        resume=workspace.resume_point(whole, 1),
    )
    resumed = train(rest)
    # Two files of tensors, each written and synced, in two checkpoints and in one; read where it was resumed.
    assert len([seconds for seconds in first if seconds > 0]) >= 8
    assert resumed
    # Every pause is followed by a sign that ends it.
    assert all(after == "progress" for one, after in pairwise(signs) if one == "pause")
