"""The planner's tokens are those of `AutoTokenizer.apply_chat_template(tokenize=True)`, and its masks those of the turns."""

import os
from pathlib import Path
from typing import Any

import pytest

from gpu_service.catalog.tokenizer_files import read_json_object, read_tokenizer_facts
from gpu_service.planner.chat_template import ChatTemplate
from gpu_service.planner.rendering import Rendered
from gpu_service.planner.tokenizer import TextTokenizer
from tests.fakes.tiny_models import LLAMA_3_2, TinyOptions, place_header_only

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is two plus two?"}, {"role": "assistant", "content": "Four."}],
    [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": "  spaces\tand\n\nlines  "},
        {"role": "assistant", "content": " yes "},
        {"role": "user", "content": "漢字 и кириллица 😀👩‍👩‍👧"},
        {"role": "assistant", "content": "é\u0301 ½ \u200b ok<|im_end|> inside"},
    ],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}],
    [{"role": "user", "content": "def f(x):\n    return x", "name": None}, {"role": "assistant", "content": "0" * 300}],
]
TRIMMING_TEMPLATE = (
    "{{ bos_token }}{%- for message in messages %}\n"
    "    {%- if message['role'] == 'assistant' %}{{ '[A] ' + message['content'] | trim + eos_token }}\n"
    "    {%- else %}{{ '[' + message['role'] + '] ' + message['content'] | trim + ' ' }}{% endif %}\n"
    "{%- endfor %}{% if add_generation_prompt %}{{ '[A] ' }}{% endif %}"
)


def smollm() -> Path:
    root = os.environ.get("TUNESMITH_TEST_MODELS")
    if not root:
        pytest.skip("TUNESMITH_TEST_MODELS names no models directory")
    directory = Path(root) / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    if not directory.is_dir():
        pytest.skip(f"SmolLM2-135M-Instruct is not below {root}")
    return directory


@pytest.fixture(params=["smollm2", "tiny", "tiny-bos", "tiny-trimming"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "smollm2":
        return smollm()
    options = TinyOptions(adds_bos=request.param != "tiny")
    placed = tmp_path / place_header_only(tmp_path, options)
    if request.param == "tiny-trimming":
        (placed / "chat_template.jinja").write_text(TRIMMING_TEMPLATE, encoding="utf-8")
    return placed


def load(directory: Path) -> tuple[TextTokenizer, ChatTemplate]:
    facts = read_tokenizer_facts(directory)
    config = read_json_object(directory / "config.json", stage="CONFIG")
    return TextTokenizer(directory, facts, config), ChatTemplate(facts.chat_template or "", facts.special_tokens)


def load_auto(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=["plain", "turns", "empty", "code"])
def test_chat_tokens_equal(directory: Path, conversation: list[dict[str, Any]]) -> None:
    tokenizer, chat = load(directory)
    auto = load_auto(directory)
    rendered = chat.render_conversation(conversation)
    assert rendered.text == auto.apply_chat_template(conversation, tokenize=False)
    [(tokens, mask, cut)] = tokenizer.encode([rendered], loss_on_all=False, max_length=4096)
    expected = auto.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"]
    assert list(tokens) == list(expected)
    assert len(mask) == len(tokens)
    assert not cut


def test_only_assistant_turns_and_their_ends_carry_loss(directory: Path) -> None:
    tokenizer, chat = load(directory)
    auto = load_auto(directory)
    conversation = CONVERSATIONS[0]
    [(tokens, mask, _)] = tokenizer.encode([chat.render_conversation(conversation)], loss_on_all=False, max_length=4096)
    prompt = auto.apply_chat_template(conversation[:-1], add_generation_prompt=True, tokenize=True, return_dict=True)
    targets = [token for token, carries in zip(tokens, mask, strict=True) if carries]
    text = auto.decode(targets)
    assert "Four." in text
    assert "two" not in text
    assert auto.eos_token_id in targets
    assert mask[: len(prompt["input_ids"]) - 1].count(1) == 0


@pytest.mark.parametrize("options", [TinyOptions(), TinyOptions(adds_bos=True), LLAMA_3_2], ids=lambda o: o.name)
def test_documents_begin_as_the_tokenizer_has_it_and_end(tmp_path: Path, options: TinyOptions) -> None:
    directory = tmp_path / place_header_only(tmp_path, options)
    facts = read_tokenizer_facts(directory)
    tokenizer = TextTokenizer(directory, facts, {})
    auto = load_auto(directory)
    text = "The quick brown fox"
    [(tokens, mask, _)] = tokenizer.encode(
        [Rendered(text=text, targets=[(4, len(text))], is_document=True)], loss_on_all=False, max_length=100
    )
    assert list(tokens) == [*auto(text)["input_ids"], auto.eos_token_id]
    assert mask[0] == 0
    assert mask[-1] == 1
    assert (
        auto.decode([t for t, carries in zip(tokens, mask, strict=True) if carries][:-1]).strip() == "quick brown fox"
    )


def test_a_model_without_tokenizer_json_is_converted(tmp_path: Path) -> None:
    """GPT-2 style files: vocab.json and merges.txt are all that is there."""
    import json

    directory = tmp_path / place_header_only(tmp_path, TinyOptions())
    model = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    reference, _ = load(directory)
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), encoding="utf-8")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    converted = TextTokenizer(directory, read_tokenizer_facts(directory), {})
    text = [Rendered(text="What is two plus two?", targets=[(0, 4)], is_document=False)]
    assert converted.encode(text, loss_on_all=False, max_length=64) == reference.encode(
        text, loss_on_all=False, max_length=64
    )
