"""The tables of docs/training.md about checkpoints, read and carried out."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from gpu_service.catalog import optimizers
from gpu_service.engine.training.certificate import Certificate, CertificateBroken, Environment
from gpu_service.engine.training.checkpoint_keeper import take_held_out
from gpu_service.engine.training.progress import TrainingProgress
from gpu_service.engine.training.retention import committed, prune

_PAGE = (Path(__file__).parents[3] / "docs/training.md").read_text(encoding="utf-8")


def _table(name: str) -> list[list[str]]:
    found = re.search(rf"<!-- example: {name} -->\n(.*?)<!-- end -->", _PAGE, re.DOTALL)
    assert found is not None
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found.group(1).strip().splitlines()]
    return rows[2:]


def test_retention(tmp_path: Path) -> None:
    progress = TrainingProgress()
    for step, loss, best, left in _table("retention"):
        progress.steps_done = int(step)
        progress.evaluations.append({"step": int(step), "loss": float(loss)})
        held_out = take_held_out(progress)
        assert (held_out.loss, held_out.best) == (float(loss), best == "yes")
        path = tmp_path / f"step-{int(step):08d}"
        path.mkdir()
        (path / "manifest.json").write_text(json.dumps({"step": int(step), "best": held_out.best}))
        prune(tmp_path, keep=2, keep_best=True)
        assert ", ".join(str(kept.step) for kept in committed(tmp_path)) == left


def test_a_loss_of_the_base_is_no_checkpoints() -> None:
    progress = TrainingProgress(steps_done=10, evaluations=[{"step": 0, "loss": 1.0}])
    assert take_held_out(progress).loss is None
    progress.evaluations.append({"step": 10, "loss": 2.0})
    assert take_held_out(progress).best
    # The next checkpoint has no newer loss, and is not better for it.
    assert (take_held_out(progress).loss, take_held_out(progress).best) == (2.0, False)


def _environment(text: str) -> Environment:
    threads = re.search(r"(\d+) threads?", text)
    return Environment(
        device="cuda" if text.startswith("GPU") else "cpu",
        device_name="",
        threads=int(threads.group(1)) if threads else 1,
        compute_dtype=text.rpartition(" ")[2],
        quantization="none",
        versions={},
    )


@pytest.mark.parametrize("row", _table("certificate"), ids=" | ".join)
def test_certificate(row: list[str]) -> None:
    saved_on, resumed_on, saved_loss, measured_loss, outcome = row
    saved = Certificate(
        probe_loss=float(saved_loss), weights_sha256="", optimizer_sha256="", environment=_environment(saved_on)
    )
    environment = saved.environment if resumed_on == "the same" else _environment(resumed_on)
    measured = replace(saved, probe_loss=float(measured_loss), environment=environment)
    if outcome == "goes on":
        saved.compare(measured)
        return
    with pytest.raises(CertificateBroken) as broken:
        saved.compare(measured)
    assert (float(broken.value.saved), float(broken.value.measured)) == (float(saved_loss), float(measured_loss))


def test_optimizers() -> None:
    told = [(name.strip("`"), number, devices) for name, number, devices, _ in _table("optimizers")]
    assert told == [
        (name, f"{round(entry.state_bytes_per_parameter, 2):g}", ", ".join(entry.devices))
        for name, entry in optimizers.REGISTRY.items()
    ]
    assert f"{41_943_040 * optimizers.REGISTRY['adamw-8bit'].state_bytes_per_parameter / 1e6:.0f} MB" in _PAGE
