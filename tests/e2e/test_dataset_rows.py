"""Datasets of every format through the whole pair: registered, previewed as a base sees them, counted, planned."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.pair import PairUnderTest
from tunesmith.common.v1 import plan_pb2, training_spec_pb2
from tunesmith.control.v1 import dataset_service_pb2, project_service_pb2
from tunesmith_client import FailedPrecondition, InvalidArgument

pytestmark = pytest.mark.timeout(180)

USER, ANSWER = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}
ROWS: dict[str, dict[str, Any]] = {
    "chat-messages": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello."}]},
    "prompt-completion": {"prompt": "Hi?", "completion": "Hello."},
    "instruction": {"instruction": "Hi?", "output": "Hello."},
    "text": {"text": "Hello."},
    "preference": {"prompt": "Hi?", "chosen": "Hello.", "rejected": "Bye."},
}


def upload(pair: PairUnderTest, root: Path, format: str, row: dict[str, Any]) -> dataset_service_pb2.Dataset:
    path = root / f"{format}.jsonl"
    path.write_text((json.dumps(row) + "\n") * 12)
    return pair.client.datasets.upload(path, name=format)


def plan(pair: PairUnderTest, name: str, datasets: list[int], **fields: Any) -> plan_pb2.Plan:
    sources = [training_spec_pb2.TraitDataset(dataset_id=item, percentage=100 / len(datasets)) for item in datasets]
    project = pair.client.projects.create(
        project_service_pb2.Project(
            name=name,
            base_model=pair.base_model,
            model_type="llama",
            training_type="lora",
            output_directory=f"./{name}",
            traits=[training_spec_pb2.Trait(trait_type="trait", datasets=sources)],
            hyperparameters=training_spec_pb2.Hyperparameters(num_steps=3, **fields),
        )
    )
    return pair.client.jobs.plan(project.project_id).plan


def test_rows_of_every_format(stub_pair: PairUnderTest, tmp_path: Path) -> None:
    client = stub_pair.client
    registered = {format: upload(stub_pair, tmp_path, format, row) for format, row in ROWS.items()}
    assert {format: dataset.format for format, dataset in registered.items()} == {format: format for format in ROWS}
    for format, dataset in registered.items():
        rows = client.datasets.preview(dataset.dataset_id, num_rows=2, base_model=stub_pair.base_model)
        assert [json.loads(row.json) for row in rows] == [ROWS[format]] * 2
        rendered = rows[0].rendered
        # The first token of a text has nothing before it to predict it from.
        assert "ello." in "".join(segment.text for segment in rendered.segments if segment.is_target)
        assert "Hi?" not in "".join(segment.text for segment in rendered.segments if segment.is_target)
        assert bool(rendered.rejected_segments) == (format == "preference")
        tokens = client.datasets.get(dataset.dataset_id, base_model=stub_pair.base_model).statistics.tokens
        assert (tokens.num_tokens, tokens.num_target_tokens) == (
            12 * rendered.num_tokens,
            12 * rendered.num_target_tokens,
        )
    ids = {format: dataset.dataset_id for format, dataset in registered.items()}
    mixed = plan(stub_pair, "mixed", [ids[format] for format in ROWS if format != "preference"])
    assert len(mixed.datasets) == len(ROWS) - 1
    pairs = plan(stub_pair, "pairs", [ids["preference"]], objective="dpo")
    assert pairs.total_examples == 24
    for name, objective in (("pairs-by-sft", "sft"), ("texts-by-dpo", "dpo")):
        wrong = ids["preference"] if objective == "sft" else ids["text"]
        with pytest.raises(InvalidArgument) as refused:
            plan(stub_pair, name, [wrong], objective=objective)
        assert refused.value.reason == "COMBINATION_NOT_ALLOWED"
        assert "hyperparameters.objective" in str(refused.value)
    with pytest.raises(FailedPrecondition) as missing:
        client.datasets.preview(ids["text"], base_model="no/such")
    assert missing.value.reason == "MODEL_NOT_FOUND"
