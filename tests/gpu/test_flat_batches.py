"""Flat batches on a CUDA device: the same losses as one by one, in memory that grows with the tokens alone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes.engine_runs import TraitRows, Workspace, read_log

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3")
_CUDA = {"type": "cuda", "index": 0}


@pytest.fixture(autouse=True)
def _needs_a_device() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("family", _FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_losses_are_those_of_one_by_one(family: str, windowed: bool, dtype: str, tolerance: float) -> None:
    import torch

    from tests.fakes.flat_models import LENGTHS, PLAIN, VOCABULARY_SIZE, WINDOWED, flat_nats, make_model, single_nats
    from tests.fakes.planned_rows import PlannedRows, make_examples

    extras = (WINDOWED if windowed else PLAIN).get(family, PLAIN[family])
    model = make_model(family, extras, getattr(torch, dtype)).to("cuda")
    rows = PlannedRows(make_examples(LENGTHS, vocabulary_size=VOCABULARY_SIZE, seed=1))
    targets = torch.tensor([sum(rows.example(reference).mask) or 1 for reference in rows.references], device="cuda")
    with torch.no_grad():
        flat, single = flat_nats(model, rows) / targets, single_nats(model, rows) / targets
    torch.testing.assert_close(flat, single, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_grows_with_the_tokens_alone(dtype: str) -> None:
    """Eight times the examples in a pass take eight times the memory, and not sixty-four times."""
    import torch

    from tests.fakes.flat_models import PLAIN, VOCABULARY_SIZE, flat_nats, make_model
    from tests.fakes.planned_rows import PlannedRows, make_examples

    model = make_model("llama", PLAIN["llama"], getattr(torch, dtype)).to("cuda")
    peaks = []
    for count in (4, 32):
        rows = PlannedRows(make_examples([512] * count, vocabulary_size=VOCABULARY_SIZE, seed=1))
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(flat_nats(model, rows).sum(), list(model.parameters()))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 10 * peaks[0]


def _carry_out(directory: Any) -> Any:
    from gpu_service.engine.resident import BaseShelf
    from gpu_service.engine.service import carry_out
    from gpu_service.engine.stopping import StopSwitch

    carry_out(directory, shelf=BaseShelf(), switch=StopSwitch(), notify=lambda notice: None)
    return read_log(directory)


@pytest.mark.parametrize("training_type", ["lora", "qlora"])
def test_pairs_are_learned(training_type: str, tmp_path: Any) -> None:
    words = ["yes", "no", "add", "fox", "dog"]
    rows = [
        {"prompt": f"What is {n}?", "chosen": f" {words[n % 5]} it is", "rejected": f" {n} and {n}"} for n in range(24)
    ]
    log = _carry_out(
        Workspace(root=tmp_path).make_run(
            "dpo",
            training_type=training_type,
            hyperparameters={"objective": "dpo", "num_steps": 10, "batch": {"examples": 6}},
            device=_CUDA,
            traits=[TraitRows(trait_type="polite", rows=rows[:18], held_out=rows[18:], format="preference")],
        )
    )

    assert log.states[-1] == "SUCCEEDED", log.payloads[-1]
    # The reference runs through other kernels than the trained pass does, so that rewards begin near 0, not at it.
    assert log.of("step")[0].loss == pytest.approx(0.6931, abs=0.02)
    assert log.of("evaluation")[-1].loss < log.of("evaluation")[0].loss - 0.1
    assert log.of("evaluation")[-1].preference.reward_accuracy > 0.8


def test_float16_goes_on_after_a_loss_that_is_not_finite(tmp_path: Any) -> None:
    import json
    import math

    from safetensors.torch import load_file, save_file

    from tests.fakes.tiny_models import TinyOptions

    workspace = Workspace(root=tmp_path)
    name = workspace.place_model(TinyOptions())
    directory = workspace.models_directory / name
    poison = json.loads((directory / "tokenizer.json").read_text())["model"]["vocab"]["~"]
    tensors = load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"][poison] = math.nan
    save_file(tensors, directory / "model.safetensors")
    rows = [{"prompt": f"add {n} and {n}", "completion": f" is {2 * n}"} for n in range(16)]
    rows[5]["prompt"] += "~"
    log = _carry_out(
        workspace.make_run(
            "float16",
            base_model=name,
            training_type="lora",
            hyperparameters={
                "num_steps": 8,
                "non_finite_policy": "skip",
                "quantization": {"compute_dtype": "float16"},
            },
            device=_CUDA,
            traits=[TraitRows(trait_type="only", rows=rows)],
        )
    )

    assert log.states[-1] == "SUCCEEDED", log.payloads[-1]
    steps = log.of("step")
    without_loss = [event.step for event in steps if not event.HasField("loss")]
    assert len(without_loss) == 2
    assert all(event.skipped for event in steps if event.step in without_loss)
    assert not steps[-1].skipped
    assert [event.code for event in log.of("warning")] == ["non-finite-loss"] * 2
