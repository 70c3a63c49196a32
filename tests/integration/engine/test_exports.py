"""What a run leaves loads elsewhere with the held-out loss of before. A merged export is the adapter on its base; one
that differs too much is left out and said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpu_service.engine import request
from gpu_service.engine.artifacts import exporting, fixed_prompts
from gpu_service.engine.artifacts.export_source import open_source
from gpu_service.engine.artifacts.logit_difference import compare
from gpu_service.engine.artifacts.tensor_files import write_tensors
from gpu_service.engine.loading import Loaded
from tests.fakes.engine_runs import RunLog, Workspace, read_log
from tests.fakes.fresh_process import ask, load_elsewhere
from tests.fakes.tiny_models import TinyOptions
from tunesmith.common.v1 import errors_pb2, event_pb2

_PAGE = (Path(__file__).parents[3] / "docs/training.md").read_text(encoding="utf-8")
_PROMPTS = ("What is 3 plus 3?", "def add_4(")
_MERGED: dict[str, Any] = {"exports": ["merged"], "num_steps": 3}
# Rounding weights of a tiny model to bfloat16 moves its logits less than this.
_ROUNDING = 0.05
_CASES = {
    "qlora": TinyOptions(tied=True),
    "lora": TinyOptions(family="qwen3", sharded=True),
    "full": TinyOptions(),
}


def _far_apart(left: list[list[float]], right: list[list[float]]) -> float:
    return float((torch.tensor(left) - torch.tensor(right)).abs().max())


@dataclass(frozen=True, kw_only=True)
class Left:
    """What a run left, and what a fresh process said of it: `merged`, `adapted`, `plain`; and `trained`, which is the
    adapter on its quantized base, or the whole model.
    """

    artifacts: Path
    base: Path
    log: RunLog
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def questions(self, workspace: Workspace, training_type: str) -> dict[str, dict[str, Any]]:
        """What the process is asked, by name of the answer."""
        adapter = self.artifacts / "adapter"
        if training_type == "full":
            return {"trained": ask(self.artifacts / "model", examples=_held_out(workspace, self.log), dtype="auto")}
        asked = {
            "merged": ask(self.artifacts / "merged", _PROMPTS),
            "adapted": ask(self.base, _PROMPTS, adapter=adapter),
            "plain": ask(self.base, _PROMPTS),
        }
        if training_type == "qlora":
            examples = _held_out(workspace, self.log)
            asked["trained"] = ask(self.base, examples=examples, adapter=adapter, quantized=True)
        return asked


@pytest.fixture(scope="module")
def left(workspace: Workspace, run_in_process: Any) -> dict[str, Left]:
    """By training type. One process loads everything, because it takes long to start."""
    found: dict[str, Left] = {}
    asked: list[tuple[Left, str, dict[str, Any]]] = []
    for training_type, options in _CASES.items():
        hyperparameters = {} if training_type == "full" else _MERGED
        directory = workspace.make_run(
            f"left-{training_type}", options=options, training_type=training_type, hyperparameters=hyperparameters
        )
        log = run_in_process(directory)
        assert log.states[-1] == "SUCCEEDED"
        base = workspace.models_directory / f"tiny/{options.name}"
        one = found[training_type] = Left(artifacts=directory / "artifacts", base=base, log=log)
        asked += [(one, name, question) for name, question in one.questions(workspace, training_type).items()]
    answers = load_elsewhere([question for _, _, question in asked])
    for (one, name, _), answer in zip(asked, answers, strict=True):
        one.answers[name] = answer
    return found


def _held_out(workspace: Workspace, log: RunLog) -> list[tuple[list[int], list[int]]]:
    (plan,) = log.of("plan")
    data = workspace.open_data(plan.data_digest)
    examples = [data.example(reference) for reference in data.held_out_examples()]
    return [(example.tokens.tolist(), example.mask.tolist()) for example in examples]


@pytest.mark.parametrize("training_type", ["qlora", "full"])
def test_artifacts_give_the_same_loss_in_a_fresh_process(training_type: str, left: dict[str, Left]) -> None:
    """An adapter on its base, and a whole model."""
    log, loaded = left[training_type].log, left[training_type].answers["trained"]
    before, after = log.of("evaluation")[0].loss, log.of("evaluation")[-1].loss
    assert loaded["loss"] == pytest.approx(after, rel=1e-6)
    assert abs(after - before) > 1e-4
    assert loaded["chat"] == "<|im_start|>user\nHello<|im_end|>\n"


@pytest.mark.parametrize("training_type", ["qlora", "lora"])
def test_merged_is_the_adapter_on_its_base(training_type: str, left: dict[str, Left]) -> None:
    one = left[training_type]
    merged, adapted, plain = (one.answers[name] for name in ("merged", "adapted", "plain"))
    assert _far_apart(merged["logits"], adapted["logits"]) < _ROUNDING
    assert _far_apart(merged["logits"], plain["logits"]) > 2 * _ROUNDING
    assert merged["chat"] == adapted["chat"] == "<|im_start|>user\nHello<|im_end|>\n"
    assert merged["tied"] == _CASES[training_type].tied
    kinds = {event.name: event.kind for event in one.log.of("artifact")}
    assert kinds["merged"] == event_pb2.ARTIFACT_KIND_MERGED
    assert kinds["adapter"] == event_pb2.ARTIFACT_KIND_ADAPTER
    (export,) = one.log.of("export")
    _assert_compared(export, training_type)
    _assert_files_are_the_bases(one.artifacts / "merged", one.base)
    _assert_said(one.artifacts, export)


def _assert_compared(export: Any, training_type: str) -> None:
    assert (export.format, export.accepted, export.threshold) == ("merged", True, 1.0)
    assert 0 < export.max_logit_difference < _ROUNDING
    assert export.num_same_top_tokens <= export.num_positions
    # What the run had was quantized, or the very base.
    by_quantization = export.trained_mean_logit_difference / export.mean_logit_difference
    assert by_quantization > 3 if training_type == "qlora" else by_quantization == pytest.approx(1, abs=0.1)


def _assert_files_are_the_bases(merged: Path, base: Path) -> None:
    """The same shards with the same tensors, all in 16 bits; what no adapter covers is only rounded."""
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert sorted(path.name for path in merged.glob("*.safetensors")) == shards
    assert (merged / "model.safetensors.index.json").is_file() == (len(shards) > 1)
    for shard in shards:
        ours, theirs = load_file(merged / shard), load_file(base / shard)
        assert ours.keys() == theirs.keys()
        assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
        for name, tensor in theirs.items():
            if "proj" not in name:
                assert torch.equal(ours[name], tensor.bfloat16())
        with safe_open(merged / shard, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    config = json.loads((merged / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config


def _assert_said(artifacts: Path, export: Any) -> None:
    card = (artifacts / "merged/README.md").read_text()
    assert f"{export.max_logit_difference:.4g}" in card
    assert f"{export.trained_max_logit_difference:.4g}" in card
    assert "library_name: transformers" in card
    report = json.loads((artifacts / "report/metrics.json").read_text())
    assert [entry["format"] for entry in report["exports"]] == ["merged"]
    assert report["exports"][0]["max_logit_difference"] == export.max_logit_difference


def test_an_export_that_differs_is_left_out(workspace: Workspace, run_in_process: Any) -> None:
    """The adapter is kept and the run succeeds; the export's numbers are told, and a warning says why."""
    directory = workspace.make_run(
        "differs", training_type="lora", hyperparameters=_MERGED | {"max_export_logit_difference": 1e-9}
    )
    log = run_in_process(directory)

    assert log.states[-1] == "SUCCEEDED"
    (export,) = log.of("export")
    assert not export.accepted
    assert {event.name for event in log.of("artifact")} == {"adapter", "report"}
    assert not (directory / "artifacts/merged").exists()
    (warning,) = (event for event in log.of("warning") if event.code == "export-differs")
    assert "max_export_logit_difference" in warning.message
    assert json.loads((directory / "artifacts/report/metrics.json").read_text())["exports"][0]["accepted"] is False


def test_export_of_an_earlier_job(
    workspace: Workspace, run_in_process: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without data, planning or training, the same bytes as when the training exported; too far off, it fails."""
    trained = workspace.make_run("exported", hyperparameters=_MERGED)
    run_in_process(trained)
    adapter = trained / "artifacts/adapter"
    later = workspace.make_run("later", start=adapter, task="export", hyperparameters=_MERGED)
    log = run_in_process(later)

    assert log.states == ["RUNNING", "SUCCEEDED"]
    assert log.phases == ["LOADING", "SAVING"]
    assert {event.name for event in log.of("artifact")} == {"merged", "report"}
    weights = "merged/model.safetensors"
    assert (later / "artifacts" / weights).read_bytes() == (trained / "artifacts" / weights).read_bytes()
    card = (later / "artifacts/merged/README.md").read_text()
    (plan,) = read_log(trained).of("plan")
    # What the adapter was trained on goes along.
    assert plan.data_digest in card
    assert "Held-out loss" in card
    # The training page's example loads it.
    (example,) = re.findall(r"<!-- runs: load -->\n```python\n(.*?)```", _PAGE, re.DOTALL)
    monkeypatch.chdir(later / "artifacts")
    capsys.readouterr()
    exec(compile(example, "training.md", "exec"), {})  # noqa: S102  # our own page
    assert capsys.readouterr().out.startswith("What is 3 plus 3?")

    strict = workspace.make_run(
        "strict", start=adapter, task="export", hyperparameters=_MERGED | {"max_export_logit_difference": 1e-9}
    )
    log = run_in_process(strict)
    failure = log.of("run_state")[-1].failure
    assert failure.reason == errors_pb2.ERROR_REASON_EXPORT_DIFFERS
    assert not log.of("artifact")
    assert [event.accepted for event in log.of("export")] == [False]
    assert not (strict / "artifacts/merged").exists()


def _half_and_without_a_type(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    del config["model_type"], config["architectures"]
    (model / "config.json").write_text(json.dumps(config))
    _rewrite(model, lambda name, tensor: (name, tensor.half()))


def _as_a_bare_decoder(model: Path) -> None:
    _rewrite(model, lambda name, tensor: (name.removeprefix("model."), tensor))


def _rewrite(model: Path, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> None:
    path = model / "model.safetensors"
    tensors = dict(change(name, tensor) for name, tensor in load_file(path).items())
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("seed", "change", "dtype"),
    [(5, _half_and_without_a_type, torch.float16), (6, _as_a_bare_decoder, torch.bfloat16)],
)
def test_bases_as_people_keep_them(
    seed: int, change: Callable[[Path], None], dtype: torch.dtype, workspace: Workspace, run_in_process: Any
) -> None:
    options = TinyOptions(seed=seed, tied=True)
    base = workspace.models_directory / workspace.place_model(options)
    change(base)
    directory = workspace.make_run(
        f"kept-{seed}", options=options, training_type="lora", hyperparameters=_MERGED, held_out=False
    )
    (export,) = run_in_process(directory).of("export")

    assert export.accepted
    assert export.max_logit_difference < _ROUNDING
    merged = AutoModelForCausalLM.from_pretrained(directory / "artifacts/merged", dtype="auto")
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert merged.dtype is dtype


def test_what_is_not_the_adapter_on_its_base_shows(workspace: Workspace, run_in_process: Any) -> None:
    """The base itself, passed off as an export: the difference is what the adapter does."""
    directory = workspace.make_run("shows", training_type="lora", hyperparameters=_MERGED, held_out=False)
    run_in_process(directory)
    base = workspace.models_directory / "tiny/llama"
    adapter = directory / "artifacts/adapter"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    loaded = Loaded(tokenizer=AutoTokenizer.from_pretrained(adapter), stored_dtype=torch.float32)
    (plan,) = read_log(directory).of("plan")
    source = open_source(request=request.read(directory), plan=plan, model=model, loaded=loaded)
    assert source is not None

    comparison = compare(source, base, lambda: None)
    assert comparison.adapter.max_difference > 2 * _ROUNDING
    assert comparison.adapter.num_same_top_tokens < comparison.adapter.num_positions
    assert compare(source, directory / "artifacts/merged", lambda: None).adapter.max_difference < _ROUNDING


def test_a_template_that_takes_no_lone_turn_compares_plain_text(workspace: Workspace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(workspace.models_directory / workspace.place_model(TinyOptions()))
    rendered = fixed_prompts.tokenize(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('a system turn comes first') }}"
    plain = fixed_prompts.tokenize(tokenizer)
    assert len(plain) == len(rendered) == len(fixed_prompts.PLAIN) + len(fixed_prompts.CHAT)
    assert tokenizer.decode(plain[-1]) in fixed_prompts.CHAT[-1]
    assert plain[-1] != rendered[-1]


def test_an_export_that_cannot_be_made_costs_no_adapter(
    workspace: Workspace, run_in_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("the device is full")

    monkeypatch.setattr(exporting, "compare", fail)
    trained = workspace.make_run("unmade", training_type="lora", hyperparameters=_MERGED, held_out=False)
    log = run_in_process(trained)
    assert log.states[-1] == "SUCCEEDED"
    assert {event.name for event in log.of("artifact")} == {"adapter", "report"}
    assert not (trained / "artifacts/merged").exists()
    (warning,) = (event for event in log.of("warning") if event.code == "export-failed")
    assert "the device is full" in warning.message
    # Where it is all that was asked for, it is the run's failure.
    later = workspace.make_run(
        "unmade-later",
        training_type="lora",
        start=trained / "artifacts/adapter",
        task="export",
        hyperparameters=_MERGED,
    )
    assert run_in_process(later).of("run_state")[-1].failure.stage == "SAVING"


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    """A shard is written without ever being in memory: the next tensor is asked for when the last one is on its way."""
    entries = [(f"layer.{n}", (8, 4), torch.bfloat16) for n in range(3)] + [("empty", (0, 4), torch.int64)]
    path, asked = tmp_path / "model.safetensors", []

    def produce(name: str) -> torch.Tensor:
        asked.append(name)
        return torch.full((8, 4), float(len(asked))) if name != "empty" else torch.zeros(0, 4, dtype=torch.int64)

    assert write_tensors(path, entries, produce) == 3 * 8 * 4 * 2
    assert asked == [name for name, _, _ in entries]
    found = load_file(path)
    assert all(torch.equal(found[name], torch.full((8, 4), n + 1.0).bfloat16()) for n, name in enumerate(asked[:3]))
    assert found["empty"].shape == (0, 4)
    with pytest.raises(ValueError, match="came out as"):
        write_tensors(path, [("layer", (4, 8), torch.float32)], lambda _: torch.zeros(8, 4))
