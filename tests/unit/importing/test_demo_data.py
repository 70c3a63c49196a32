"""The demo's data is what its script writes, is well formed, and keeps its held-out questions to itself."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

DATA = Path(__file__).resolve().parents[3] / "examples/data"
FILES = [f"{trait}-{part}.jsonl" for trait in ("structure", "units") for part in ("train", "held-out")]


def _read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def _card(example: dict[str, Any]) -> dict[str, str]:
    return json.loads(example["messages"][1]["content"])


def _prompt(example: dict[str, Any]) -> str:
    return example["prompt"] if "prompt" in example else example["messages"][0]["content"]


def test_the_script_reproduces_the_files(tmp_path: Path) -> None:
    write: Callable[[Path], None] = runpy.run_path(str(DATA / "make_data.py"))["main"]
    write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name


@pytest.mark.parametrize("name", FILES)
def test_there_is_enough_of_it(name: str) -> None:
    assert len(_read(name)) >= (200 if name.endswith("train.jsonl") else 24)


@pytest.mark.parametrize("name", FILES[:2])
def test_structure_lines_are_chats_answered_with_one_json_object(name: str) -> None:
    for example in _read(name):
        assert list(example) == ["messages"]
        assert [message["role"] for message in example["messages"]] == ["user", "assistant"]
        card = _card(example)
        assert list(card) == ["topic", "kind", "fact"]
        assert card["topic"] in _prompt(example)
        assert len(card["fact"].split()) <= 12


@pytest.mark.parametrize("name", FILES[2:])
def test_units_lines_are_worked_in_three_lines(name: str) -> None:
    for example in _read(name):
        assert list(example) == ["prompt", "completion"]
        empty, given, rule, result = example["completion"].split("\n")
        assert (empty, given[:7], rule[:6], result[:8]) == ("", "Given: ", "Rule: ", "Result: ")
        count, _, factor, _, product = result.split()[1:6]
        assert int(count) * int(factor) == int(product)
        assert given.split()[1] == count
        assert rule.split(" = ")[1].split()[0] == factor


@pytest.mark.parametrize("trait", ["structure", "units"])
def test_no_held_out_prompt_is_trained_on_and_none_is_twice(trait: str) -> None:
    training = [_prompt(example) for example in _read(f"{trait}-train.jsonl")]
    held_out = [_prompt(example) for example in _read(f"{trait}-held-out.jsonl")]
    assert len({*training, *held_out}) == len(training) + len(held_out)


def test_no_held_out_topic_or_fact_is_trained_on() -> None:
    training = [_card(example) for example in _read("structure-train.jsonl")]
    held_out = [_card(example) for example in _read("structure-held-out.jsonl")]
    for key in ("topic", "fact"):
        assert not {card[key] for card in training} & {card[key] for card in held_out}
    assert {card["kind"] for card in held_out} == {card["kind"] for card in training}


def test_no_held_out_conversion_is_trained_on() -> None:
    training = {example["completion"] for example in _read("units-train.jsonl")}
    assert not training & {example["completion"] for example in _read("units-held-out.jsonl")}


def test_the_demo_project_trains_on_these_files_and_shows_held_out_prompts() -> None:
    project = yaml.safe_load((DATA.parent / "demo_project.yaml").read_text(encoding="utf-8"))
    named = []
    for trait in project["traits"]:
        named += [dataset["dataset"] for dataset in trait["datasets"]] + trait["held_out_datasets"]
    assert sorted(f"{name}.jsonl" for name in named) == sorted(FILES)
    for sample in project["sample_prompts"]:
        held_out = _read(f"{sample['trait_type']}-held-out.jsonl")
        assert sample["prompt"] in {_prompt(example) for example in held_out}
