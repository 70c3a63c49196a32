"""Each loading stage, broken between plan and load: its name, the library's own words, the file, and one attempt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fakes.engine_runs import RunLog, Workspace
from tests.fakes.tiny_models import LLAMA_3_2, LLAMA_3_VOCABULARY_SIZE, TinyOptions
from tunesmith.common.v1 import errors_pb2

STAGES = ["CONFIG", "TOKENIZER", "WEIGHTS", "QUANTIZATION", "ADAPTER"]


def _corrupt_config(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "llama", ', encoding="utf-8")


def _remove_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def _make_it_another_family(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}), encoding="utf-8")


def _remove_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


def _empty_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{}", encoding="utf-8")


def _damage_tokenizer(directory: Path) -> None:
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["model"]["type"] = "Nonesuch"
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")


def _truncate_shard(directory: Path) -> None:
    shard = sorted(directory.glob("model-*.safetensors"))[1]
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 100)


def _remove_shard(directory: Path) -> None:
    sorted(directory.glob("model-*.safetensors"))[1].unlink()


def _move_a_tensor_elsewhere(directory: Path) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = next(
        shard for shard in shards if shard != index["weight_map"]["model.norm.weight"]
    )
    path.write_text(json.dumps(index), encoding="utf-8")


def _change_a_weight(directory: Path) -> None:
    path = sorted(directory.glob("model-*.safetensors"))[0]
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, path)


def _nothing(directory: Path) -> None:
    del directory


def _name_other_targets(plan: dict[str, Any]) -> None:
    plan["resolved"]["lora"]["target_modules"] = ["no_such_layer"]


def _expect_more_layers(plan: dict[str, Any]) -> None:
    plan["num_covered_linears"] += 1


def _drop_a_tensor_and_its_digest(directory: Path) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = directory / index["weight_map"].pop("model.norm.weight")
    path.write_text(json.dumps(index), encoding="utf-8")
    tensors = load_file(shard)
    del tensors["model.norm.weight"]
    save_file(tensors, shard)


@dataclass(frozen=True, kw_only=True)
class Break:
    """One way to break one stage, and what the failure must say."""

    stage: str
    exception_type: str
    # Part of the library's own message, and the file that is named.
    message: str
    file: str
    model: Callable[[Path], None] = _nothing
    plan: Callable[[dict[str, Any]], None] | None = None
    device: str = "cpu"
    training_type: str = "qlora"
    pinned: bool = True


BREAKS = {
    "corrupt config": Break(
        stage="CONFIG",
        exception_type="OSError",
        message="not a valid JSON file",
        file="config.json",
        model=_corrupt_config,
    ),
    "no config": Break(
        stage="CONFIG",
        exception_type="FileNotFoundError",
        message="config.json",
        file="config.json",
        model=_remove_config,
    ),
    "another family": Break(
        stage="CONFIG",
        exception_type="gpu_service.engine.loading.config.ConfigOfAnotherFamily",
        message="Qwen2Config",
        file="config.json",
        model=_make_it_another_family,
    ),
    "no tokenizer file": Break(
        stage="TOKENIZER",
        exception_type="FileNotFoundError",
        message="no vocabulary file",
        file="tokenizer.json",
        model=_remove_tokenizer,
    ),
    "empty tokenizer file": Break(
        stage="TOKENIZER",
        exception_type="KeyError",
        message="added_tokens",
        file="tokenizer.json",
        model=_empty_tokenizer,
    ),
    # tokenizers raises the bare class for every damaged file; it reaches the outermost boundary, which names the stage.
    "damaged tokenizer file": Break(
        stage="TOKENIZER",
        exception_type="Exception",
        message="ModelUntagged",
        file="tokenizer.json",
        model=_damage_tokenizer,
    ),
    "truncated shard": Break(
        stage="WEIGHTS",
        exception_type="safetensors._safetensors_rust.SafetensorError",
        message="header",
        file="model-00002",
        model=_truncate_shard,
    ),
    "missing shard": Break(
        stage="WEIGHTS",
        exception_type="FileNotFoundError",
        message="No such file",
        file="model-00002",
        model=_remove_shard,
    ),
    "index and shard disagree": Break(
        stage="WEIGHTS",
        exception_type="gpu_service.engine.loading.weights.TensorNotInShard",
        message="model.norm.weight",
        file="model-",
        model=_move_a_tensor_elsewhere,
    ),
    "other weights than planned": Break(
        stage="WEIGHTS",
        exception_type="gpu_service.engine.loading.weights.WeightsChanged",
        message="digest",
        file="",
        model=_change_a_weight,
    ),
    "missing tensor": Break(
        stage="WEIGHTS",
        exception_type="gpu_service.engine.loading.building.IncompleteWeights",
        message="model.norm.weight",
        file="",
        model=_drop_a_tensor_and_its_digest,
        training_type="lora",
        pinned=False,
    ),
    "a device that cannot": Break(
        stage="QUANTIZATION",
        # Torch's own, by what it was built for.
        exception_type="AssertionError" if torch.version.cuda is None else "RuntimeError",
        message="not compiled with CUDA" if torch.version.cuda is None else "no NVIDIA driver",
        file="",
        device="cuda",
    ),
    "targets match nothing": Break(
        stage="ADAPTER",
        exception_type="peft.utils.error.NoMatchingPeftModuleError",
        message="no_such_layer",
        file="",
        plan=_name_other_targets,
    ),
    "another coverage": Break(
        stage="ADAPTER",
        exception_type="gpu_service.engine.loading.adapter.CoverageMismatch",
        message="the plan says",
        file="",
        plan=_expect_more_layers,
    ),
}


@pytest.fixture(scope="module")
def planned(workspace: Workspace, run_in_process: Any) -> Path:
    """A run that was planned and trained; its model, plan and data are what the tests break copies of."""
    directory = workspace.make_run("intact", options=TinyOptions(sharded=True))
    log: RunLog = run_in_process(directory)
    assert log.states[-1] == "SUCCEEDED"
    return directory


@pytest.mark.parametrize("quantizer", ["bitsandbytes", "own"])
@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_stage_says_what_broke(
    name: str, quantizer: str, planned: Path, workspace: Workspace, run_in_process: Any, tmp_path: Path
) -> None:
    """The same words whoever reads and quantizes."""
    case = _by(quantizer, BREAKS[name])
    if case.device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has the device")
    directory = _copy_run(planned, tmp_path, case)
    command = _answer_with(_copy_plan(workspace, tmp_path, case), tmp_path)

    log = run_in_process(directory, planner_command=command)

    assert log.states == ["RUNNING", "FAILED"]
    failure = log.of("run_state")[-1].failure
    assert errors_pb2.ErrorReason.Name(failure.reason) == f"ERROR_REASON_LOAD_{case.stage}"
    assert failure.stage == case.stage
    assert failure.exception_type == case.exception_type
    assert case.message in failure.message
    assert failure.message
    assert failure.file.startswith(case.file)
    assert bool(failure.file) == bool(case.file)
    assert failure.versions["transformers"] == metadata.version("transformers")
    assert failure.versions["bitsandbytes"] == metadata.version("bitsandbytes")
    # Every stage was begun once, those before the broken one ended well, and none came after it.
    begun = [stage for stage, status in log.stages if status == "STARTED"]
    assert begun == STAGES[: STAGES.index(case.stage) + 1]
    assert [stage for stage, status in log.stages if status == "FINISHED"] == begun[:-1]
    assert log.stages[-1] == (case.stage, "FAILED")
    assert log.of("loading")[-1].failure == failure
    assert log.of("memory_released")[0].engine_ended
    assert log.of("memory_released")[0].resident_bytes == 0


def _by(quantizer: str, case: Break) -> Break:
    def change(plan: dict[str, Any]) -> None:
        plan["quantizer"] = quantizer
        if case.plan is not None:
            case.plan(plan)

    return replace(case, plan=change)


@pytest.mark.parametrize("quantizer", ["bitsandbytes", "own"])
def test_the_report_of_the_library_is_kept(
    quantizer: str, planned: Path, workspace: Workspace, run_in_process: Any, tmp_path: Path
) -> None:
    """transformers says `see the above report`; the failure carries that report."""

    def shrink(directory: Path) -> None:
        for path in directory.glob("model-*.safetensors"):
            tensors = load_file(path)
            for name in tensors:
                if name.endswith("norm.weight"):
                    tensors[name] = tensors[name][:7].clone()
            save_file(tensors, path)

    case = Break(stage="QUANTIZATION", exception_type="", message="", file="", model=shrink, pinned=False)
    case = _by(quantizer, case)
    directory = _copy_run(planned, tmp_path, case)
    log = run_in_process(directory, planner_command=_answer_with(_copy_plan(workspace, tmp_path, case), tmp_path))

    failure = log.of("run_state")[-1].failure
    assert failure.stage == "QUANTIZATION"
    assert failure.exception_type == "RuntimeError"
    assert "MISMATCH" in failure.details["library_report"]


def test_a_config_without_model_type_is_built_by_its_family(
    planned: Path, workspace: Workspace, run_in_process: Any, tmp_path: Path
) -> None:
    def forget_type(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        del config["model_type"]
        (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")

    case = Break(stage="", exception_type="", message="", file="", model=forget_type)
    directory = _copy_run(planned, tmp_path, case)
    before = (tmp_path / "model/config.json").read_bytes()
    log = run_in_process(directory, planner_command=_answer_with(_copy_plan(workspace, tmp_path, case), tmp_path))

    assert log.states[-1] == "SUCCEEDED"
    assert log.stage_details("CONFIG") == {"config_class": "LlamaConfig", "model_type": "llama"}
    assert (tmp_path / "model/config.json").read_bytes() == before


def test_a_checkpoint_in_the_shape_of_the_report_loads(workspace: Workspace, run_in_process: Any) -> None:
    """Llama 3.2's vocabulary, config written by transformers 4.57.2, 4 bits: what the report could not load."""
    directory = workspace.make_run("report", options=LLAMA_3_2, chat=False)
    log = run_in_process(directory)

    assert log.states == ["RUNNING", "SUCCEEDED"]
    assert log.stage_details("CONFIG")["config_class"] == "LlamaConfig"
    assert log.stage_details("TOKENIZER")["vocabulary_size"] == str(LLAMA_3_VOCABULARY_SIZE)
    assert log.stage_details("QUANTIZATION")["config_class"] == "LlamaConfig"
    assert log.stage_details("QUANTIZATION")["quantized_linears"] == "14"


def _copy_run(planned: Path, to: Path, case: Break) -> Path:
    """The same run once more, over a copy of its model that is broken now."""
    request = json.loads((planned / "run.json").read_text())
    model = to / "model"
    shutil.copytree(request["model_directory"], model)
    case.model(model)
    directory = to / "run"
    directory.mkdir()
    request |= {"model_directory": str(model), "device": {"type": case.device, "index": 0}}
    request["spec"]["training_type"] = case.training_type
    if not case.pinned:
        request["weights_digest"] = ""
    (directory / "run.json").write_text(json.dumps(request), encoding="utf-8")
    return directory


def _copy_plan(workspace: Workspace, to: Path, case: Break) -> Path:
    """The plan of the intact run, changed as the case wants; its shards stay where they are."""
    cache = to / "cache"
    shutil.copytree(workspace.cache_directory, cache)
    (plan_directory,) = (path.parent for path in cache.rglob("plan.json"))
    plan = json.loads((plan_directory / "plan.json").read_text())
    plan["training_type"] = case.training_type
    if case.training_type == "lora":
        plan["resolved"]["quantization"]["method"] = "none"
    if case.plan is not None:
        case.plan(plan)
    (plan_directory / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    return plan_directory


def _answer_with(plan_directory: Path, to: Path) -> tuple[str, ...]:
    """A planner that has planned already: what is broken afterwards is first met by the stages."""
    answer = to / "answer.json"
    answer.write_text(json.dumps({"type": "planned", "plan_directory": str(plan_directory)}) + "\n", encoding="utf-8")
    return ("/bin/sh", "-c", f"cat '{answer}'", "planner")
