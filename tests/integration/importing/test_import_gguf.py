"""GGUF files become models: a tiny one that is made here, and the demo's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpu_service.engine.importing.__main__ import main
from tests.fakes.real_model import SMOLLM

VOCABULARY = 270
HIDDEN, LAYERS, HEADS, INNER = 64, 2, 4, 96
TEMPLATE = "{% for message in messages %}<|start|>{{ message['content'] }}<|end|>{% endfor %}"


def _write_gguf(
    path: Path, *, splitting_rule: str = "smollm", leave_out: str | None = None
) -> dict[str, numpy.ndarray]:
    """A llama with a byte-level vocabulary; returns the values its quantized tensors stand for."""
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting_rule)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ["ĊĊ", "th", "in", "er", "an", "re", "on", "at", "en", "es", "or"]
    tokens = ["<|unknown|>", "<|start|>", "<|end|>", *alphabet, *merged]
    assert len(tokens) == VOCABULARY
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (VOCABULARY - 3))
    writer.add_token_merges([f"{pair[0]} {pair[1]}" for pair in merged])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    values = {}
    random = numpy.random.default_rng(7)
    for name, shape in _shapes().items():
        if name == leave_out:
            continue
        values[name] = random.normal(0, 0.1, shape).astype(numpy.float32)
        if len(shape) == 2:
            writer.add_tensor(
                name, quantize(values[name], GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0
            )
        else:
            writer.add_tensor(name, values[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        shapes |= {f"{block}.attn_norm.weight": (HIDDEN,), f"{block}.ffn_norm.weight": (HIDDEN,)}
        shapes |= {f"{block}.attn_q.weight": (HIDDEN, HIDDEN), f"{block}.attn_output.weight": (HIDDEN, HIDDEN)}
        shapes |= {f"{block}.attn_{part}.weight": (HIDDEN // 2, HIDDEN) for part in "kv"}
        shapes |= {f"{block}.ffn_{part}.weight": (INNER, HIDDEN) for part in ("gate", "up")}
        shapes[f"{block}.ffn_down.weight"] = (HIDDEN, INNER)
    return shapes


def _command(models: Path, source: Path, *more: str) -> list[str]:
    module = [sys.executable, "-m", "gpu_service.engine.importing"]
    return [*module, "--models-directory", str(models), "--name", "org/tiny", "--gguf", str(source), *more]


def _import(models: Path, source: Path, *more: str) -> dict[str, Any]:
    done = subprocess.run(_command(models, source, *more), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result: dict[str, Any] = json.loads(line)
    return result


@pytest.fixture
def refuse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., dict[str, Any]]]:
    """Imports in this process, which has the libraries already, and gives the refusal."""
    # What the command sets for its own process is put back.
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1")
    handler = signal.getsignal(signal.SIGTERM)

    def run(models: Path, source: Path) -> dict[str, Any]:
        assert main(["--models-directory", str(models), "--name", "org/tiny", "--gguf", str(source)]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        failure: dict[str, Any] = json.loads(said.err.splitlines()[-1])
        return failure

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, numpy.ndarray], dict[str, Any]]:
    directory = tmp_path_factory.mktemp("gguf")
    values = _write_gguf(directory / "tiny.gguf")
    return values, _import(directory / "models", directory / "tiny.gguf", "--dtype", "float32")


def test_the_model_loads_with_the_values_of_the_file(tiny: tuple[dict[str, numpy.ndarray], dict[str, Any]]) -> None:
    values, result = tiny
    model = AutoModelForCausalLM.from_pretrained(result["path"])
    assert model.config.model_type == result["model_type"] == "llama"
    assert getattr(model.config, "quantization_config", None) is None
    assert model.num_parameters() == result["num_parameters"]
    assert model.dtype is torch.float32
    # Eight-bit blocks round; the rows of these two are stored in the model's own order.
    for name, parameter in (
        ("token_embd.weight", model.model.embed_tokens.weight),
        ("blk.1.ffn_down.weight", model.model.layers[1].mlp.down_proj.weight),
    ):
        numpy.testing.assert_allclose(parameter.detach().numpy(), values[name], atol=0.003)
    assert torch.isfinite(model(torch.tensor([[1, 5, 9]])).logits).all()


def test_the_tokenizer_and_its_chat_template_come_along(
    tiny: tuple[dict[str, numpy.ndarray], dict[str, Any]],
) -> None:
    _, result = tiny
    assert result["has_chat_template"]
    tokenizer = AutoTokenizer.from_pretrained(result["path"])
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|start|>", "<|end|>")
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered == "<|start|>hi<|end|>"
    # Without the rule that the file names, the two line breaks would be split from each other by the digit.
    assert tokenizer.tokenize("a\n\n3") == ["a", "ĊĊ", "3"]
    config = json.loads((Path(result["path"]) / "config.json").read_text())
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & set(config)


@pytest.mark.parametrize(
    ("change", "reason", "part"),
    [
        ({"splitting_rule": "chatglm-bpe"}, "UNSUPPORTED_TOKENIZER", "chatglm-bpe"),
        ({"leave_out": "blk.1.ffn_up.weight"}, "INVALID_MODEL", "layers.1.mlp.up_proj"),
    ],
)
def test_a_file_that_would_give_another_model_is_refused(
    tmp_path: Path, refuse: Callable[..., dict[str, Any]], change: dict[str, str], reason: str, part: str
) -> None:
    _write_gguf(tmp_path / "tiny.gguf", **change)
    failure = refuse(tmp_path / "models", tmp_path / "tiny.gguf")
    assert failure["reason"] == reason
    assert part in failure["message"]
    assert list((tmp_path / "models/org").iterdir()) == []


def test_a_file_cut_short_is_refused(tmp_path: Path, refuse: Callable[..., dict[str, Any]]) -> None:
    path = tmp_path / "tiny.gguf"
    _write_gguf(path)
    path.write_bytes(path.read_bytes()[:-5000])
    assert refuse(tmp_path / "models", path)["reason"] == "INVALID_MODEL"
    assert list((tmp_path / "models/org").iterdir()) == []


def test_a_stopped_import_leaves_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "never-written.gguf")
    command = _command(tmp_path / "models", tmp_path / "never-written.gguf", "--sha256", "00" * 32)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    staging = tmp_path / "models/org"
    while not (staging.exists() and any(staging.iterdir())):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert list(staging.iterdir()) == []


@pytest.mark.timeout(600)
def test_the_demo_model_answers(real_models: Path) -> None:
    path = real_models / SMOLLM
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
