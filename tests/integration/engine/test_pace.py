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


def test_what_a_run_starts_from_gives_signs_while_it_is_hashed_and_read(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of a whole model is many gigabytes: hashing it must not look like a hang."""
    from gpu_service.engine import durable
    from gpu_service.engine.loading import starting

    hyperparameters = {"num_steps": 1, "save_every_steps": 0}
    earlier = workspace.make_run("earlier", training_type="lora", hyperparameters=hyperparameters)
    carry_out(earlier, shelf=BaseShelf(), switch=StopSwitch(), notify=lambda notice: None)
    start = earlier / "checkpoints/step-00000001"
    num_bytes = sum(file.stat().st_size for file in start.iterdir())
    monkeypatch.setattr(durable, "_CHUNK_BYTES", 4096)
    signs: list[str] = []
    heard: list[str] = []
    put = starting.put

    def note_what_is_heard(*arguments: Any) -> dict[str, str]:
        signs.clear()
        told = put(*arguments)
        heard.extend(signs)
        return told

    monkeypatch.setattr(starting, "put", note_what_is_heard)
    later = workspace.make_run("later", training_type="lora", hyperparameters=hyperparameters, start=start)
    switch = StopSwitch(lambda: signs.append("progress"), lambda seconds: signs.append("pause"))
    carry_out(later, shelf=BaseShelf(), switch=switch, notify=lambda notice: None)

    assert read_log(later).states[-1] == "SUCCEEDED"
    # One for each part that was hashed; then the tensors are read in one piece, which is announced.
    assert heard.count("progress") >= num_bytes // 4096
    assert heard[-2:] == ["pause", "progress"]
