"""What a preview shows of rows is what would be trained on: texts that add up, masks, cuts, drops, counts."""

import io
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from gpu_service.domain.errors import Refusal
from gpu_service.planner import inspection
from gpu_service.planner.inspection import InspectRequest, inspect_dataset
from tests.fakes.datasets import write_blob
from tests.fakes.tiny_models import TinyOptions, place_header_only
from tunesmith.gpu.v1 import run_service_pb2

CHAT = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": " What is  two plus two?\n"},
        {"role": "assistant", "content": "Four 😀."},
        {"role": "user", "content": "漢字?"},
        {"role": "assistant", "content": "Yes."},
    ]
}


class Bench:
    """A base and a place for blobs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        place_header_only(root / "models")

    def inspect(
        self, rows: list[dict[str, Any]] | bytes, format: str, *, model: str = "tiny/llama", **wanted: Any
    ) -> run_service_pb2.InspectDatasetResponse:
        request = InspectRequest.from_json(
            {
                "inspect": {
                    "dataset": write_blob(self.root / "blobs", 7, rows, format),
                    "base_model": model,
                    "num_rows": 5,
                    **wanted,
                },
                "model_directory": str(self.root / "models" / model),
                "blobs_directory": str(self.root / "blobs"),
                "cache_directory": str(self.root / "cache"),
            }
        )
        found = inspect_dataset(request, stream=io.StringIO())
        return json_format.ParseDict(found, run_service_pb2.InspectDatasetResponse())

    def refuse(self, *arguments: Any, **wanted: Any) -> Refusal:
        with pytest.raises(Refusal) as caught:
            self.inspect(*arguments, **wanted)
        return caught.value


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def texts(segments: Any) -> list[tuple[str, bool]]:
    return [(segment.text, segment.is_target) for segment in segments]


def test_segments_read_as_the_rendered_text(bench: Bench) -> None:
    [row] = bench.inspect([CHAT], "chat-messages").rows
    assert texts(row.segments) == [
        (
            "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n What is  two plus two?\n<|im_end|>\n"
            "<|im_start|>assistant\n",
            False,
        ),
        ("Four 😀.<|im_end|>\n", True),
        ("<|im_start|>user\n漢字?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Yes.<|im_end|>\n", True),
    ]
    assert row.num_tokens == sum(segment.num_tokens for segment in row.segments)
    assert row.num_target_tokens == sum(segment.num_tokens for segment in row.segments if segment.is_target)
    assert not row.rejected_segments
    assert (row.truncated, row.dropped_reason) == (False, "")
    [everything] = bench.inspect([CHAT], "chat-messages", loss_on="all").rows
    assert [carries for _, carries in texts(everything.segments)] == [False, True]


def test_a_document_shows_what_begins_and_ends_it(bench: Bench) -> None:
    model = place_header_only(bench.root / "models", TinyOptions(chat_template=False, adds_bos=True))
    [row] = bench.inspect([{"prompt": "2 + 2 =", "completion": " 4"}], "prompt-completion", model=model).rows
    assert texts(row.segments) == [("<|endoftext|>2 + 2 =", False), (" 4<|endoftext|>", True)]


def test_a_pair_has_both_answers(bench: Bench) -> None:
    [row] = bench.inspect([{"prompt": "Q", "chosen": "yes", "rejected": "no"}], "preference").rows
    prompt = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert texts(row.segments) == [(prompt, False), ("yes<|im_end|>\n", True)]
    assert texts(row.rejected_segments) == [(prompt, False), ("no<|im_end|>\n", True)]
    assert row.num_tokens == sum(item.num_tokens for item in (*row.segments, *row.rejected_segments))


def test_cuts_and_drops_are_shown_and_counted(bench: Bench) -> None:
    rows = [
        {"prompt": "0", "completion": "1"},
        {"prompt": "0 " * 40, "completion": "1"},
        {"prompt": "0", "completion": "1 " * 40},
    ]
    found = bench.inspect(rows, "prompt-completion", max_length=24, count_tokens=True)
    assert [row.truncated for row in found.rows] == [False, True, True]
    assert [row.dropped_reason for row in found.rows] == ["", "no_target_tokens", ""]
    tokens = found.tokens
    assert tokens.base_model == "tiny/llama"
    assert dict(tokens.dropped) == {"no_target_tokens": 1}
    assert tokens.num_truncated == 1
    assert tokens.longest_tokens == 24
    kept = [row for row in found.rows if not row.dropped_reason]
    assert tokens.num_tokens == sum(row.num_tokens for row in kept)
    assert tokens.num_target_tokens == sum(row.num_target_tokens for row in kept)
    assert 8 <= found.rows[0].num_tokens < 16
    assert [(bucket.minimum, bucket.count) for bucket in tokens.lengths] == [(8, 1), (16, 1)]


def test_the_histogram_has_no_gaps(bench: Bench) -> None:
    rows = [{"text": "0"}, {"text": "0 1 2 3 4 5 6 7 8 9 " * 10}] * 300
    found = bench.inspect(rows, "text", num_rows=0, count_tokens=True)
    assert not found.rows
    lengths = found.tokens.lengths
    assert sum(bucket.count for bucket in lengths) == 600
    assert [bucket.minimum for bucket in lengths] == [2**power for power in range(1, len(lengths) + 1)]
    assert [bucket.count for bucket in lengths] == [300, *[0] * (len(lengths) - 2), 300]
    assert len(lengths) > 2


def test_only_what_is_shown_is_read(bench: Bench) -> None:
    content = b'{"text": "a"}\n{"text": "b"}\n{broken\n'
    assert len(bench.inspect(content, "text", num_rows=2).rows) == 2
    refusal = bench.refuse(content, "text", num_rows=2, count_tokens=True)
    assert (refusal.reason, refusal.details) == ("DATASET_MALFORMED", {"dataset_id": "7", "line": "3"})


def test_an_empty_dataset_has_no_lengths(bench: Bench) -> None:
    tokens = bench.inspect(b"", "text", count_tokens=True).tokens
    assert (tokens.num_tokens, list(tokens.lengths)) == (0, [])


def test_rows_end_where_a_message_would_be_full(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "MAXIMUM_TEXT_BYTES", 500)
    rows = [{"text": "a" * 100} for _ in range(9)]
    assert len(bench.inspect(rows, "text", num_rows=9).rows) == 3


@pytest.mark.parametrize(
    ("wanted", "reason", "field"),
    [
        ({"format": "csv"}, "DATASET_FORMAT_UNKNOWN", "dataset.format"),
        ({"chat_template": "vicuna"}, "INVALID_FIELD", "chat_template"),
        ({"loss_on": "some"}, "INVALID_FIELD", "loss_on"),
        ({"max_length": 4}, "INVALID_FIELD", "max_length"),
        ({"max_length": 513}, "INVALID_FIELD", "max_length"),
        ({"max_length": -1}, "INVALID_FIELD", "max_length"),
    ],
)
def test_settings_are_refused_as_a_plan_refuses_them(
    bench: Bench, wanted: dict[str, Any], reason: str, field: str
) -> None:
    refusal = bench.refuse([{"text": "a"}], wanted.pop("format", "text"), **wanted)
    assert (refusal.reason, refusal.field) == (reason, field)


@pytest.mark.parametrize("format", ["chat-messages", "preference"])
def test_chat_needs_a_template(bench: Bench, format: str) -> None:
    model = place_header_only(bench.root / "models", TinyOptions(chat_template=False))
    other = [*CHAT["messages"][:4], {"role": "assistant", "content": "No."}]
    row = {**CHAT, "chosen": CHAT["messages"], "rejected": other}
    refusal = bench.refuse([row], format, model=model)
    assert (refusal.reason, refusal.stage) == ("CHAT_TEMPLATE_MISSING", "TOKENIZER")
    assert bench.inspect([row], format, model=model, chat_template="chatml").rows


def test_a_template_that_raises_names_the_line(bench: Bench) -> None:
    template = "{% for m in messages %}{{ m.content }}{% if loop.index > 4 %}{{ raise_exception('no more than four') }}"
    path = bench.root / "models/tiny/llama/chat_template.jinja"
    path.write_text(template + "{% endif %}{% endfor %}")
    short = {"messages": CHAT["messages"][1:3]}
    refusal = bench.refuse([short, CHAT], "chat-messages")
    assert (refusal.reason, refusal.details["line"]) == ("DATASET_MALFORMED", "2")
    assert "no more than four" in refusal.message


def test_a_template_without_a_mask_names_the_line(bench: Bench) -> None:
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (bench.root / "models/tiny/llama/chat_template.jinja").write_text(template)
    refusal = bench.refuse([CHAT], "chat-messages")
    assert (refusal.reason, refusal.details) == ("CHAT_TEMPLATE_UNUSABLE", {"dataset_id": "7", "line": "1"})
    assert refusal.message.startswith("dataset 7, line 1: ")
