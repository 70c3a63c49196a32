"""The planner's tokens are those of `AutoTokenizer.apply_chat_template`, and its masks those of the turns."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, processors, trainers

from gpu_service.catalog import templates
from gpu_service.catalog.tokenizer_files import read_json_object, read_tokenizer_facts
from gpu_service.planner.chat_template import ChatTemplate
from gpu_service.planner.encoding import ExampleEncoder
from gpu_service.planner.inspection import describe_example
from gpu_service.planner.rendering import Rendered
from gpu_service.planner.tokenizer import TextTokenizer
from gpu_service.planner.tokenizer_source import load_source
from tests.fakes.real_model import SMOLLM
from tests.fakes.tiny_models import LLAMA_3_2, TOOL_TEMPLATE, TinyOptions, place_header_only

# The first to ask for the real model may have to import it.
pytestmark = pytest.mark.timeout(600)

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


@pytest.fixture(params=["smollm2", "tiny", "tiny-bos", "tiny-trimming"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "smollm2":
        models_directory: Path = request.getfixturevalue("real_models")
        return models_directory / SMOLLM
    options = TinyOptions(adds_bos=request.param != "tiny")
    placed = tmp_path / place_header_only(tmp_path, options)
    if request.param == "tiny-trimming":
        (placed / "chat_template.jinja").write_text(TRIMMING_TEMPLATE, encoding="utf-8")
    return placed


def load(directory: Path) -> tuple[TextTokenizer, ChatTemplate]:
    facts = read_tokenizer_facts(directory)
    config = read_json_object(directory / "config.json", stage="CONFIG")
    with tempfile.TemporaryDirectory() as cache:
        source = load_source(directory, facts, config_type=config.get("model_type", ""), cache_directory=Path(cache))
    chat = ChatTemplate(facts.chat_template or "{{ '' }}", source.special_tokens, tool_text=facts.tool_template)
    return TextTokenizer(source, config), chat


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


ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds <b>numbers</b> & more: é 漢.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
    },
}
CALLS: list[dict[str, Any]] = [
    {"role": "system", "content": "Use tools."},
    {"role": "user", "content": "What is 1 + 2?", "name": None},
    {
        "role": "assistant",
        "content": None,
        "reasoning": "It is a sum.",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None, "c": "é<"}}},
            {"id": "2", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}},
        ],
    },
    {"role": "tool", "name": "add", "tool_call_id": "1", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]
REASONING_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:"
    "{% if m.reasoning_content is defined %}{{ m.reasoning_content }}|{{ m.thinking }}{% endif %}"
    "{{ m.keys() | list }}{{ m.content is defined }}{% endfor %}{{ tools is none }}"
)


def assert_same_text(directory: Path, conversation: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
    """The two agree on the text and the tokens; gives the text."""
    tokenizer, chat = load(directory)
    auto = load_auto(directory)
    rendered = chat.render_conversation(conversation, tools=tools)
    assert rendered.text == auto.apply_chat_template(conversation, tools=tools, tokenize=False)
    [(tokens, _, _)] = tokenizer.encode([rendered], loss_on_all=False, max_length=4096)
    expected = auto.apply_chat_template(conversation, tools=tools, tokenize=True, return_dict=True)["input_ids"]
    assert list(tokens) == list(expected)
    return rendered.text


@pytest.mark.parametrize(
    "tools", [None, [], [ADD], [ADD, {**ADD, "strict": True}]], ids=["none", "empty", "one", "two"]
)
@pytest.mark.parametrize("template", [TOOL_TEMPLATE, templates.REGISTRY["chatml"].read_text()], ids=["tools", "chatml"])
def test_tools_and_their_calls_equal(tmp_path: Path, template: str, tools: list[dict[str, Any]] | None) -> None:
    """Also where the template knows nothing of tools: it leaves them out, there as here."""
    directory = tmp_path / place_header_only(tmp_path)
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    conversation = (
        CALLS if template == TOOL_TEMPLATE else [{**turn, "content": turn["content"] or ""} for turn in CALLS]
    )
    text = assert_same_text(directory, conversation, tools)
    assert ("Adds <b>" in text) == (bool(tools) and template == TOOL_TEMPLATE)


def test_messages_reach_templates_as_there(tmp_path: Path) -> None:
    """Keys that are null are left out, and reasoning goes by its several names."""
    directory = tmp_path / place_header_only(tmp_path)
    (directory / "chat_template.jinja").write_text(REASONING_TEMPLATE, encoding="utf-8")
    _, chat = load(directory)
    expected = load_auto(directory).apply_chat_template(CALLS, tokenize=False)
    assert chat.render(CALLS) == expected
    assert "It is a sum.|It is a sum." in expected


@pytest.mark.parametrize("where", ["file", "config"])
@pytest.mark.parametrize("tools", [None, [ADD]], ids=["without", "with"])
def test_a_template_of_its_own_for_tools(tmp_path: Path, where: str, tools: list[dict[str, Any]] | None) -> None:
    directory = tmp_path / place_header_only(tmp_path)
    plain = templates.REGISTRY["chatml"].read_text()
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["chat_template"]
    if where == "file":
        (directory / "chat_template.jinja").write_text(plain, encoding="utf-8")
        (directory / "additional_chat_templates").mkdir()
        (directory / "additional_chat_templates/tool_use.jinja").write_text(TOOL_TEMPLATE, encoding="utf-8")
    else:
        config["chat_template"] = [
            {"name": "default", "template": plain},
            {"name": "tool_use", "template": TOOL_TEMPLATE},
        ]
    path.write_text(json.dumps(config), encoding="utf-8")
    text = assert_same_text(directory, [{**turn, "content": turn["content"] or ""} for turn in CALLS], tools)
    assert text.startswith("[tools]") == bool(tools)


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
    tokenizer, _ = load(directory)
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
    directory = tmp_path / place_header_only(tmp_path, TinyOptions())
    model = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    reference, _ = load(directory)
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), encoding="utf-8")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    converted, _ = load(directory)
    text = [Rendered(text="What is two plus two?", targets=[(0, 4)], is_document=False)]
    assert converted.encode(text, loss_on_all=False, max_length=64) == reference.encode(
        text, loss_on_all=False, max_length=64
    )


def write_sentencepiece_style(directory: Path, tokenizer_class: str) -> None:
    """The pipeline that Llama 2's tokenizer.json has: a normalizer in place of a pre-tokenizer, and byte fallback."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)], show_progress=False
    )
    tokenizer.train_from_iterator(["What is two plus two? the quick brown fox [INST] [/INST]"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    value = json.loads(tokenizer.to_str())
    value["added_tokens"] = [token for token in value["added_tokens"] if token["content"] in special]
    (directory / "tokenizer.json").write_text(json.dumps(value), encoding="utf-8")
    config = {
        "tokenizer_class": tokenizer_class,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": False,
        "chat_template": "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
        "{% else %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("tokenizer_class", "model_type"),
    [
        ("LlamaTokenizer", "llama"),
        ("PreTrainedTokenizerFast", "llama"),
        ("LlamaTokenizerFast", "phi3"),
        ("", "mistral"),
    ],
)
def test_pipelines_that_transformers_rebuilds_are_rebuilt(
    tmp_path: Path, tokenizer_class: str, model_type: str
) -> None:
    """For some classes transformers makes another pipeline than tokenizer.json has; ids must be its ids."""
    directory = tmp_path / place_header_only(tmp_path, TinyOptions())
    write_sentencepiece_style(directory, tokenizer_class)
    rewrite(directory / "config.json", model_type=model_type)
    assert_equal_to_auto(directory)


@pytest.mark.parametrize("trims", [True, False])
def test_spaces_of_an_answer_carry_loss(tmp_path: Path, trims: bool) -> None:
    """Also where the tokenizer's offsets leave spaces out, as GPT-2's do: indentation is part of a code."""
    directory = tmp_path / place_header_only(tmp_path, TinyOptions(adds_bos=True))
    value = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": trims, "use_regex": True}
    value["post_processor"] = {"type": "Sequence", "processors": [byte_level, value["post_processor"]]}
    (directory / "tokenizer.json").write_text(json.dumps(value), encoding="utf-8")
    tokenizer, chat = load(directory)
    conversation = [
        {"role": "user", "content": "  Code? "},
        {"role": "assistant", "content": "  if a:\n        b  \n    "},
    ]
    rendered = chat.render_conversation(conversation)
    [example] = ExampleEncoder(tokenizer, loss_on_all=False, max_length=4096).encode([rendered])
    segments = describe_example(example, tokenizer)["segments"]
    [(start, end)] = rendered.targets
    assert [segment["text"] for segment in segments] == [rendered.text[:start], rendered.text[start:end]]
    auto = load_auto(directory)
    assert list(example.tokens) == auto.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"]
    document = Rendered(text="two plus two", targets=[(0, 12)], is_document=True)
    [(tokens, _, _)] = tokenizer.encode([document], loss_on_all=False, max_length=4096)
    assert list(tokens) == [*auto("two plus two")["input_ids"], auto.eos_token_id]


@pytest.mark.parametrize("style", ["smollm2", "sentencepiece"])
def test_segments_of_a_preview_read_as_the_text(request: pytest.FixtureRequest, tmp_path: Path, style: str) -> None:
    """Runs of tokens are decoded one by one, where a decoder would strip the space that a run begins with."""
    if style == "smollm2":
        models_directory: Path = request.getfixturevalue("real_models")
        directory = models_directory / SMOLLM
    else:
        directory = tmp_path / place_header_only(tmp_path, TinyOptions())
        write_sentencepiece_style(directory, "LlamaTokenizer")
    tokenizer, chat = load(directory)
    for conversation in CONVERSATIONS:
        rendered = chat.render_conversation([turn for turn in conversation if turn["role"] != "system"])
        [example] = ExampleEncoder(tokenizer, loss_on_all=False, max_length=4096).encode([rendered])
        shown = describe_example(example, tokenizer)["segments"]
        assert "".join(segment["text"] for segment in shown) == rendered.text
        assert sum(segment["num_tokens"] for segment in shown) == len(example.tokens)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tokenizer_class", ["Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_qwen_s_own_class_is_followed(tmp_path: Path, model_type: str, tokenizer_class: str) -> None:
    directory = tmp_path / place_header_only(tmp_path, TinyOptions())
    rewrite(directory / "config.json", model_type=model_type)
    rewrite(directory / "tokenizer_config.json", tokenizer_class=tokenizer_class)
    assert_equal_to_auto(directory)


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def assert_equal_to_auto(directory: Path) -> None:
    tokenizer, chat = load(directory)
    auto = load_auto(directory)
    for conversation in CONVERSATIONS:
        if any(message["role"] == "system" for message in conversation):
            conversation = conversation[1:]
        rendered = chat.render_conversation(conversation)
        [(tokens, _, _)] = tokenizer.encode([rendered], loss_on_all=False, max_length=4096)
        assert list(tokens) == auto.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"]
    document = Rendered(text="two plus two", targets=[(0, 12)], is_document=True)
    [(tokens, _, _)] = tokenizer.encode([document], loss_on_all=False, max_length=4096)
    assert list(tokens) == [*auto("two plus two")["input_ids"], auto.eos_token_id]


@pytest.mark.parametrize("name", templates.REGISTRY)
def test_catalog_templates_render_as_transformers_renders_them(tmp_path: Path, name: str) -> None:
    directory = tmp_path / place_header_only(tmp_path, TinyOptions(chat_template=False, adds_bos=True))
    text = templates.REGISTRY[name].read_text()
    chat = ChatTemplate(text, read_tokenizer_facts(directory).special_tokens)
    auto = load_auto(directory)
    for conversation in CONVERSATIONS:
        for prompt in (False, True):
            messages = conversation[:-1] if prompt else conversation
            expected = auto.apply_chat_template(
                messages, chat_template=text, tokenize=False, add_generation_prompt=prompt
            )
            assert chat.render(messages, add_generation_prompt=prompt) == expected


def test_generation_tags_give_the_mask_that_transformers_gives(tmp_path: Path) -> None:
    directory = tmp_path / place_header_only(tmp_path, TinyOptions())
    text = (
        "{% for m in messages %}[{{ m.role }}] {% if m.role == 'assistant' %}\n"
        "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}\n"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    (directory / "chat_template.jinja").write_text(text, encoding="utf-8")
    tokenizer, chat = load(directory)
    auto = load_auto(directory)
    for conversation in CONVERSATIONS[:2]:
        [(tokens, mask, _)] = tokenizer.encode(
            [chat.render_conversation(conversation)], loss_on_all=False, max_length=4096
        )
        expected = auto.apply_chat_template(
            conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert list(tokens) == expected["input_ids"]
        assert list(mask) == expected["assistant_masks"]
