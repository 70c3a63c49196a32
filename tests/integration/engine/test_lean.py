"""The fast path's own model against the libraries': names, tensors, first weights, what is saved, what is imported."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_service.catalog import families, methods, quantization
from gpu_service.engine import head_start
from gpu_service.engine.fast_path.flat_adamw import FlatAdamW
from gpu_service.engine.lean import choice
from gpu_service.engine.lean import method as lean_method
from gpu_service.engine.lean.builders import Builders
from gpu_service.engine.lean.config import LeanConfig, TakesTheLibrary
from gpu_service.engine.lean.model import frequencies
from gpu_service.engine.loading import Loaded, LoadRequest, direct, load
from gpu_service.engine.loading.work import HeldBase
from gpu_service.engine.stopping import StopSwitch
from tests.fakes import tiny_models
from tests.fakes.base_loading import same
from tests.fakes.engine_runs import Workspace, read_log
from tests.fakes.fast_models import ALL_SEVEN, make_fast
from tests.fakes.tiny_models import TinyOptions
from tests.integration.engine.conftest import RunInProcess
from tunesmith.common.v1 import plan_pb2, training_spec_pb2

pytestmark = pytest.mark.timeout(240)

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_FAST = {"trainer": "fast", "quantization": {"method": "nf4", "double_quantization": True}}
_LATE = (
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "tokenizers",
    "huggingface_hub",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "sympy",
    "matplotlib",
    "scipy",
    "sklearn",
    "pandas",
)


class _Silent:
    loading_stage = ""

    def emit(self, message: object) -> None:
        pass


def _request(
    directory: Path, family: str, *, is_lean: bool, resident: Any = None, quantizes: bool = True
) -> LoadRequest:
    settings = training_spec_pb2.Hyperparameters(
        quantization=training_spec_pb2.Quantization(
            method="nf4" if quantizes else "none", double_quantization=quantizes, compute_dtype="bfloat16"
        ),
        lora=training_spec_pb2.Lora(rank=4, alpha=8, dropout=0.25, target_modules=ALL_SEVEN),
        seed=7,
    )
    num_covered = 2 * sum(name in settings.lora.target_modules for name in ALL_SEVEN)
    plan = plan_pb2.Plan(resolved=settings, num_covered_linears=num_covered, model_type=family, quantizer="own")
    made_with = choice.builders(plan)
    if not is_lean:
        made_with = Builders(
            family=import_module(families.REGISTRY[family].builder),
            quantization=import_module(quantization.REGISTRY[settings.quantization.method].builder),
            method=import_module(methods.REGISTRY["qlora" if quantizes else "lora"].builder),
        )
    return LoadRequest(
        model_directory=directory,
        base_model="org/name",
        weights_digest="",
        plan=plan,
        is_lean=is_lean,
        compute_dtype=torch.bfloat16,
        device=torch.device("cpu"),
        quantizer="own" if quantizes else "",
        resident=None if resident is None else HeldBase(model=resident),
        **vars(made_with),
    )


def _load(request: LoadRequest) -> Loaded:
    loaded = Loaded()
    load(request, loaded, switch=StopSwitch(), reporter=_Silent())
    return loaded


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module", params=[*_FAMILIES, "llama-tied"])
def both(request: pytest.FixtureRequest, models: Path) -> tuple[Path, str, Loaded, Loaded]:
    """A model's directory and family, loaded without the libraries and by them, each with its adapter."""
    family, _, tied = str(request.param).partition("-")
    directory = models / tiny_models.place(models, TinyOptions(family=family, tied=bool(tied)))
    assert choice.fits(_request(directory, family, is_lean=True))
    lean = _load(_request(directory, family, is_lean=True))
    return directory, family, lean, _load(_request(directory, family, is_lean=False))


def test_every_tensor_is_the_libraries_under_its_name(both: tuple[Path, str, Loaded, Loaded]) -> None:
    _, _, lean, plain = both
    ours, theirs = dict(lean.model.named_parameters()), dict(plain.model.named_parameters())
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        found = ours[name]
        assert found.requires_grad == expected.requires_grad, name
        # The library holds norms, embeddings and head in float32, which are 16-bit numbers.
        assert torch.equal(found.to(expected.dtype), expected), name
        if hasattr(expected, "quant_state"):
            for one, other in (
                (found.quant_state, expected.quant_state),
                (found.quant_state.state2, expected.quant_state.state2),
            ):
                assert torch.equal(one.absmax, other.absmax), name
                assert torch.equal(one.code, other.code), name
                assert one.blocksize == other.blocksize
            assert torch.equal(found.quant_state.offset, expected.quant_state.offset)
    rotary, expected_rotary = lean.base.model.rotary_emb, plain.base.model.rotary_emb
    assert torch.equal(rotary.inv_freq, expected_rotary.inv_freq)
    assert rotary.attention_scaling == expected_rotary.attention_scaling


def test_what_is_saved_is_what_peft_saves(both: tuple[Path, str, Loaded, Loaded], tmp_path: Path) -> None:
    _, _, lean, plain = both
    lean.model.save_pretrained(tmp_path / "lean")
    plain.model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "lean" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes(), name


def test_the_libraries_take_over_what_is_loaded(both: tuple[Path, str, Loaded, Loaded]) -> None:
    directory, family, *_ = both
    lean = _load(_request(directory, family, is_lean=True))
    base = lean_method.detach(lean.model)
    taken = _load(_request(directory, family, is_lean=False, resident=base))
    held = {value.untyped_storage().data_ptr() for name, value in base.named_parameters() if value.dtype == torch.uint8}
    for name, value in taken.base.named_parameters():
        if value.dtype == torch.uint8:
            assert value.untyped_storage().data_ptr() in held, f"{name} was copied"
    method = import_module(methods.REGISTRY["qlora"].builder)
    again = _load(_request(directory, family, is_lean=False))
    same(method.detach(taken.model), method.detach(again.model))


def test_a_base_that_is_not_quantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Elsewhere than on a GPU the library maps such a base.
    monkeypatch.setattr(direct, "is_wanted", lambda request: True)
    directory = tmp_path / tiny_models.place(tmp_path, TinyOptions(tied=True))
    lean = _load(_request(directory, "llama", is_lean=True, quantizes=False))
    plain = _load(_request(directory, "llama", is_lean=False, quantizes=False))
    theirs = dict(plain.model.named_parameters())
    for name, value in lean.model.named_parameters():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name
    fast = make_fast(lean.model, dtype=torch.bfloat16)
    fast.release()
    base = lean_method.detach(lean.model)
    held = {value.data_ptr() for value in base.parameters()}
    taken = _load(_request(directory, "llama", is_lean=False, quantizes=False, resident=base))
    method = import_module(methods.REGISTRY["lora"].builder)
    found = method.detach(taken.model)
    assert {value.data_ptr() for value in found.parameters()} == held
    for name, value in method.detach(plain.model).named_parameters():
        assert torch.equal(found.get_parameter(name), value), name


def test_the_librarys_base_gets_a_lean_adapter(both: tuple[Path, str, Loaded, Loaded]) -> None:
    directory, family, lean, _ = both
    method = import_module(methods.REGISTRY["qlora"].builder)
    base = method.detach(_load(_request(directory, family, is_lean=False)).model)
    request = _request(directory, family, is_lean=True, resident=base)
    assert choice.fits(request)
    loaded = _load(request)
    assert list(dict(loaded.model.named_parameters())) == list(dict(lean.model.named_parameters()))
    assert lean_method.detach(loaded.model) is base
    assert lean_method.count_covered(base) == 0


_ROTARY: dict[str, dict[str, Any]] = {
    "not said": {},
    "plain": {"rope_theta": 500000.0, "rope_scaling": None},
    "linear": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "new form": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
}
_SIZES = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
}


def _write(directory: Path, **values: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(_SIZES | values))
    return directory


@pytest.mark.parametrize("family", _FAMILIES)
def test_what_a_config_leaves_out_is_the_librarys_default(family: str, tmp_path: Path) -> None:
    import transformers

    silent = {name: value for name, value in _SIZES.items() if name != "rms_norm_eps"}
    (tmp_path / "config.json").write_text(json.dumps({**silent, "model_type": family, "head_dim": 128}))
    lean, expected = LeanConfig.read(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)
    assert lean.rms_norm_eps == expected.rms_norm_eps
    assert lean.tie_word_embeddings == expected.tie_word_embeddings
    assert lean.output_bias == getattr(expected, "attention_bias", False)
    assert lean.mlp_bias == getattr(expected, "mlp_bias", False)
    assert lean.rope_parameters == expected.rope_parameters


@pytest.mark.parametrize("kind", _ROTARY)
def test_positions_are_rotated_as_by_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    _write(tmp_path, **_ROTARY[kind])
    expected = LlamaRotaryEmbedding(LlamaConfig.from_pretrained(tmp_path))
    assert torch.equal(frequencies(LeanConfig.read(tmp_path)), expected.inv_freq)
    assert expected.attention_scaling == 1.0


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "gemma3_text"},
        {"rope_theta": None},
        {"rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 10000.0}},
        {"rope_theta": 10000.0, "num_key_value_heads": None},
        {"rope_theta": 10000.0, "rms_norm_eps": None},
        {"rope_theta": 10000.0, "hidden_act": "gelu"},
        {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        {"rope_theta": 10000.0, "quantization_config": {}},
        {"rope_theta": 10000.0, "model_type": "qwen3"},
    ],
)
def test_a_config_that_does_not_say_it_all_takes_the_library(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TakesTheLibrary):
        LeanConfig.read(_write(tmp_path, **values))


def test_the_optimizer_steps_as_torchs() -> None:
    class _Adapter:
        def __init__(self, values: torch.Tensor) -> None:
            self.parameter = torch.nn.Parameter(values.clone())

    torch.manual_seed(0)
    values = torch.randn(1000)
    settings = training_spec_pb2.Optimizer(
        name="adamw", learning_rate=1e-2, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1
    )
    adapter = _Adapter(values)
    ours = FlatAdamW(adapter, settings)  # type: ignore[arg-type]
    theirs_parameter = torch.nn.Parameter(values.clone())
    theirs = torch.optim.AdamW([theirs_parameter], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    for number in range(5):
        gradient = torch.randn(1000)
        flag = torch.tensor(float(number == 2))
        for optimizer, parameter in ((ours, adapter.parameter), (theirs, theirs_parameter)):
            parameter.grad = gradient.clone()
            optimizer.found_inf = flag  # type: ignore[attr-defined]
            optimizer.step()
        assert torch.equal(adapter.parameter, theirs_parameter)
    for name, value in theirs.state[theirs_parameter].items():
        assert torch.equal(ours.state[adapter.parameter][name], value), name


def test_a_run_is_the_same_with_and_without_the_libraries(workspace: Workspace, run_in_process: RunInProcess) -> None:
    hyperparameters = {**_FAST, "num_steps": 3, "lora": {"rank": 4, "dropout": 0.1}}
    lean = run_in_process(workspace.make_run("lean", hyperparameters=hyperparameters))
    # A sample prompt is answered by the library's model, which takes over the base that stayed.
    prompt = {"trait_type": "coding", "prompt": "def add_1("}
    plain = run_in_process(workspace.make_run("plain", hyperparameters=hyperparameters, sample_prompts=[prompt]))
    other = {**hyperparameters, "seed": 3}
    third = run_in_process(workspace.make_run("third", hyperparameters=other))
    fresh = run_in_process(workspace.make_run("fresh", hyperparameters=hyperparameters))
    for log in (lean, plain, third, fresh):
        assert log.states[-1] == "SUCCEEDED"
    assert [step.loss for step in lean.of("step")] == [step.loss for step in plain.of("step")]
    assert [step.loss for step in lean.of("step")] == [step.loss for step in fresh.of("step")]
    assert [step.loss for step in lean.of("step")] != [step.loss for step in third.of("step")]
    assert [one.loss for one in lean.of("evaluation")] == [one.loss for one in plain.of("evaluation")]
    assert lean.stage_details("CONFIG")["config_class"] == "LeanConfig"
    assert plain.stage_details("CONFIG")["config_class"] == "LlamaConfig"
    saved = [workspace.root / "runs" / name / "1" / "artifacts" / "adapter" for name in ("lean", "plain")]
    names = sorted(path.name for path in saved[0].iterdir())
    assert names == sorted(path.name for path in saved[1].iterdir())
    for name in names:
        if name != "README.md":
            assert (saved[0] / name).read_bytes() == (saved[1] / name).read_bytes(), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_head_start_fails_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger=head_start.__name__)
    with head_start.preparing(torch.device("cuda", 0)):
        pass
    assert "no head start" in caplog.text


def test_nothing_of_the_libraries_is_imported_before_the_first_step(workspace: Workspace, tmp_path: Path) -> None:
    directory = workspace.make_run("fresh-process", hyperparameters=_FAST)
    program = f"""
        import sys
        from pathlib import Path
        import torch
        from gpu_service.engine import service
        from gpu_service.engine.reporter import Reporter
        from gpu_service.engine.resident import BaseShelf
        from gpu_service.engine.stopping import StopSwitch
        from tunesmith.common.v1 import event_pb2

        found = []
        emit = Reporter.emit

        def look(self, message):
            if isinstance(message, event_pb2.StepEvent) and not found:
                found.append([name for name in {_LATE!r} if name in sys.modules])
            emit(self, message)

        Reporter.emit = look
        torch.set_num_threads(1)
        outcome = service.carry_out(
            Path({str(directory)!r}), shelf=BaseShelf(), switch=StopSwitch(), notify=lambda notice: None
        )
        assert outcome.state == event_pb2.RUN_STATE_SUCCEEDED
        assert found == [[]], found
        assert "peft" in sys.modules, "what is saved is written by PEFT"
    """
    finished = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    log = read_log(directory)
    assert log.stage_details("TOKENIZER") == {"read": "when it is saved"}
    assert (directory / "artifacts/adapter/tokenizer.json").is_file()
