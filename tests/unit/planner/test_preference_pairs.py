"""A preference pair is one example of two sequences: cut each on its own, loss on the answers, dropped when useless."""

import io
from pathlib import Path
from typing import Any

import pytest

from gpu_service.catalog.tokenizer_files import read_tokenizer_facts
from gpu_service.domain.errors import Refusal
from gpu_service.domain.planned_data import PlannedDataDamaged, TokenShard
from gpu_service.domain.spec import DatasetReference
from gpu_service.planner.chat_template import ChatTemplate
from gpu_service.planner.formats import preference
from gpu_service.planner.progress import Progress
from gpu_service.planner.rendering import RenderedPair
from gpu_service.planner.rows import RowError
from gpu_service.planner.shard_settings import ShardSettings
from gpu_service.planner.token_store import TokenStores
from gpu_service.planner.tokenizer import TextTokenizer
from gpu_service.planner.tokenizer_source import load_source
from gpu_service.planner.toolchain import Toolchain
from tests.fakes.datasets import write_blob
from tests.fakes.tiny_models import CHAT_TEMPLATE, TinyOptions, place_header_only

CHAT = ChatTemplate(CHAT_TEMPLATE, {})
USER = {"role": "user", "content": "Q"}
GOOD, BAD = {"role": "assistant", "content": "A"}, {"role": "assistant", "content": "B"}
TAGGED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}.{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def targets(pair: RenderedPair) -> list[list[str]]:
    return [[half.text[start:end] for start, end in half.targets] for half in (pair.chosen, pair.rejected)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "A", "rejected": "B"},
        {"prompt": "Q", "chosen": [GOOD], "rejected": "B"},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_every_way_to_write_it_comes_to_the_same_two_texts(row: dict[str, Any]) -> None:
    pair = preference.render(row, CHAT)
    prompt = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert [half.text for half in (pair.chosen, pair.rejected)] == [f"{prompt}{answer}<|im_end|>\n" for answer in "AB"]
    assert targets(pair) == [["A<|im_end|>\n"], ["B<|im_end|>\n"]]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, TAGGED], ids=["prefixes", "tags"])
def test_earlier_answers_are_part_of_the_prompt(template: str) -> None:
    history = [USER, {"role": "assistant", "content": "early"}, USER]
    row = {"prompt": history, "chosen": [GOOD], "rejected": [BAD, USER, GOOD]}
    chosen, rejected = targets(preference.render(row, ChatTemplate(template, {})))
    assert [text[0] for text in chosen] == ["A"]
    assert [text[0] for text in rejected] == ["B", "A"]
    common = {"chosen": [*history, GOOD], "rejected": [*history, BAD, USER, GOOD]}
    assert targets(preference.render(common, ChatTemplate(template, {}))) == [chosen, rejected]


def test_without_a_template_texts_are_joined_and_messages_refused() -> None:
    pair = preference.render({"prompt": "Q: ", "chosen": "A", "rejected": "B"}, None)
    assert (pair.chosen.text, pair.rejected.text, pair.chosen.is_document) == ("Q: A", "Q: B", True)
    with pytest.raises(Refusal, match="CHAT_TEMPLATE_MISSING"):
        preference.render({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "A", "rejected": "B"}, "different turns"),
        ({"prompt": "Q", "chosen": "A"}, "no list of 'rejected'"),
        ({"prompt": "Q", "chosen": 1, "rejected": "B"}, "no list of 'chosen'"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "'chosen' has no answer"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "'rejected' has no answer"),
        ({"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, {**USER, "content": "R"}, BAD]}, "no answer"),
        ({"prompt": [USER, GOOD], "chosen": [GOOD], "rejected": [BAD]}, "nothing to answer"),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [BAD]}, "'chosen' has no answer"),
        ({"prompt": [], "chosen": [GOOD], "rejected": [BAD]}, "no list of 'prompt'"),
    ],
)
def test_bad_pairs(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        preference.render(row, CHAT)


def make_shard(root: Path, rows: list[dict[str, Any]], *, loss_on: str = "targets", max_length: int = 64) -> TokenShard:
    if not (root / "tiny").exists():
        place_header_only(root, TinyOptions())
    directory = root / "tiny/llama"
    source = load_source(directory, read_tokenizer_facts(directory), config_type="llama", cache_directory=root)
    reference = DatasetReference(**{**write_blob(root / "blobs", 1, rows, "preference"), "size_bytes": 0})
    tools = Toolchain(
        settings=ShardSettings(
            tokenizer_digest=source.digest,
            template=CHAT_TEMPLATE,
            tool_template=None,
            max_length=max_length,
            loss_on=loss_on,
        ),
        tokenizer=TextTokenizer(source, {}),
        chat=CHAT,
    )
    progress = Progress(io.StringIO(), total=len(rows))
    with TokenStores(blobs_directory=root / "blobs", cache_directory=root, tools=tools, progress=progress) as stores:
        return stores.open_whole(reference).close()


def test_a_shard_keeps_the_two_apart(tmp_path: Path) -> None:
    shard = make_shard(tmp_path, [{"prompt": "What is two?", "chosen": "0", "rejected": "Yes it is"}], loss_on="all")
    example = shard.example(0)
    chosen, rejected = example.mask[: example.rejected_start], example.mask[example.rejected_start :]
    assert 0 < example.rejected_start < len(example.tokens)
    for half in (chosen, rejected):
        # Even where all tokens carry loss, a pair's are those of its answers.
        assert bytes(half) == bytes(sorted(half))
        assert half[0] == 0
        assert half[-1] == 1
    prompt = chosen.tolist().count(0)
    assert list(example.tokens[:prompt]) == list(example.tokens[example.rejected_start :][:prompt])
    assert shard.facts["num_tokens"] == len(example.tokens)


def test_each_half_is_cut_and_a_useless_pair_dropped(tmp_path: Path) -> None:
    rows = [
        {"prompt": "0 1", "chosen": "2 " * 60, "rejected": "3"},
        {"prompt": "0 " * 60, "chosen": "1", "rejected": "2"},
        {"prompt": "0", "chosen": "1 " * 60 + "a", "rejected": "1 " * 60 + "b"},
        {"prompt": "0", "chosen": "1", "rejected": "2"},
    ]
    shard = make_shard(tmp_path, rows, max_length=32)
    assert shard.facts["dropped"] == {"no_target_tokens": [1], "identical_answers": [2]}
    assert [shard.was_truncated(index) for index in range(shard.num_examples)] == [True, False]
    example = shard.example(0)
    assert example.rejected_start == 32
    assert len(example.tokens) < 64


def test_damage_to_what_keeps_them_apart_is_named(tmp_path: Path) -> None:
    shard = make_shard(tmp_path, [{"prompt": "0", "chosen": "1", "rejected": "2"}])
    path = shard.directory / "rejected.bin"
    path.unlink()
    path.write_bytes((2**31).to_bytes(4, "little"))
    with pytest.raises(PlannedDataDamaged, match=r"rejected\.bin"):
        TokenShard(shard.directory).example(0)
    path.write_bytes(b"")
    with pytest.raises(PlannedDataDamaged, match=r"rejected\.bin"):
        TokenShard(shard.directory)
