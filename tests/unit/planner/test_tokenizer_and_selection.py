"""Masks follow spans, lengths are cut, and damaged plans are named, not read."""

import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from gpu_service.catalog.tokenizer_files import read_tokenizer_facts
from gpu_service.domain.device import Device
from gpu_service.domain.errors import Refusal
from gpu_service.domain.planned_data import PlannedData, PlannedDataDamaged
from gpu_service.domain.quantizer import TESTED_VERSIONS
from gpu_service.domain.spec import TrainingSpec
from gpu_service.planner import exact
from gpu_service.planner.exact import PlanRequest, make_plan
from gpu_service.planner.rendering import Rendered
from gpu_service.planner.tokenizer import TextTokenizer
from gpu_service.planner.tokenizer_source import TokenizerSource, load_source
from tests.fakes.datasets import make_spec, write_blob
from tests.fakes.tiny_models import TinyOptions, place_header_only


class Discard:
    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        return None


def load(directory: Path, cache_directory: Path) -> TokenizerSource:
    facts = read_tokenizer_facts(directory)
    return load_source(directory, facts, config_type="llama", cache_directory=cache_directory)


@pytest.fixture
def tokenizer(tmp_path: Path) -> TextTokenizer:
    directory = tmp_path / place_header_only(tmp_path, TinyOptions(adds_bos=True))
    return TextTokenizer(load(directory, tmp_path), {})


def test_first_tokens_never_carry_loss_and_all_means_all_others(tokenizer: TextTokenizer) -> None:
    rendered = Rendered(text="the quick", targets=[(4, 9)], is_document=False)
    [(tokens, mask, _)] = tokenizer.encode([rendered], loss_on_all=True, max_length=99)
    assert list(mask) == [0] + [1] * (len(tokens) - 1)
    [(_, mask, _)] = tokenizer.encode([rendered], loss_on_all=False, max_length=99)
    assert 0 < sum(mask) < len(tokens)


def test_an_empty_span_carries_no_loss(tokenizer: TextTokenizer) -> None:
    """A turn of no text, in the middle of a token: that token is not the turn's."""
    for at in range(10):
        rendered = Rendered(text="the quick", targets=[(at, at)], is_document=False)
        [(_, mask, _)] = tokenizer.encode([rendered], loss_on_all=False, max_length=99)
        assert 1 not in mask


def test_cutting_says_so(tokenizer: TextTokenizer) -> None:
    rendered = Rendered(text="0 " * 50, targets=[(90, 100)], is_document=True)
    [(whole, _, cut)] = tokenizer.encode([rendered], loss_on_all=False, max_length=1000)
    assert not cut
    [(tokens, mask, cut)] = tokenizer.encode([rendered], loss_on_all=False, max_length=8)
    assert cut
    assert list(tokens) == list(whole[:8])
    assert 1 not in mask
    [(_, _, exact)] = tokenizer.encode([rendered], loss_on_all=False, max_length=len(whole))
    assert not exact


def test_a_broken_tokenizer_file_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / place_header_only(tmp_path)
    (directory / "tokenizer.json").write_bytes(b'{"version": "1.0"')
    with pytest.raises(Refusal) as caught:
        load(directory, tmp_path)
    assert (caught.value.reason, caught.value.stage, caught.value.file) == (
        "MODEL_INVALID",
        "TOKENIZER",
        "tokenizer.json",
    )
    assert caught.value.exception_type


def make(tmp_path: Path, **fields: Any) -> Path:
    models = tmp_path / "models"
    if not models.exists():
        place_header_only(models)
    rows = [{"prompt": f"what is {n}", "completion": "0 1 2 " * (n % 5)} for n in range(20)]
    references = [
        write_blob(tmp_path / "blobs", 1, rows, "prompt-completion"),
        write_blob(tmp_path / "blobs", 2, rows[:3], "prompt-completion"),
    ]
    value = make_spec(references, held_out=[2], **fields)
    request = PlanRequest(
        spec=TrainingSpec.from_json(value),
        model_directory=models / "tiny/llama",
        blobs_directory=tmp_path / "blobs",
        cache_directory=tmp_path / "cache",
        device=Device(),
        weights_digest="",
        spec_digest="",
    )
    return make_plan(request, stream=Discard())  # type: ignore[arg-type]


def test_every_step_is_full_but_the_last_and_epochs_are_reshuffled(tmp_path: Path) -> None:
    data = PlannedData.open(make(tmp_path, hyperparameters={"batch": {"examples": 8}, "num_epochs": 2.3}))
    steps = [data.step_examples(step) for step in range(data.num_steps)]
    assert [len(step) for step in steps] == [8, 8, 8, 8, 8, 6]
    flat = [reference for step in steps for reference in step]
    assert sorted(flat[:20]) == sorted(flat[20:40]) == sorted(set(flat))
    assert flat[:20] != flat[20:40]
    assert data.epoch_of_step(0) == 0.0
    assert data.epoch_of_step(5) == 2.0
    assert data.epoch_of_step(data.num_steps) == 2.3
    assert [reference.source_index for reference in data.held_out_examples()] == [1, 1, 1]
    for index in (-1, 6):
        with pytest.raises(IndexError):
            data.step_examples(index)
    for outside in ((9, 0), (0, 20), (0, -1), (-1, 0)):
        with pytest.raises(IndexError):
            data.example(outside)


def test_a_plan_that_is_there_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(tmp_path)
    monkeypatch.setattr(exact, "stage_directory", None)
    assert make(tmp_path) == first
    monkeypatch.undo()
    (first / "selection.bin").unlink()
    assert make(tmp_path) == first
    assert PlannedData.open(first).num_steps > 0


@pytest.mark.parametrize(("version", "quantizer"), [(TESTED_VERSIONS[0], "own"), ("0.0.1", "bitsandbytes")])
def test_a_run_is_planned_for_the_installed_libraries(
    version: str, quantizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine loads by this plan: who quantizes must not be left to chance."""
    monkeypatch.setattr(metadata, "version", lambda library: version)
    data = PlannedData.open(make(tmp_path, training_type="qlora", hyperparameters={"trainer": "fast"}))
    assert data.plan["quantizer"] == quantizer


def test_the_plan_counts_what_the_steps_hold(tmp_path: Path) -> None:
    data = PlannedData.open(make(tmp_path, hyperparameters={"batch": {"examples": 3}, "num_steps": 17}))
    seen = [data.example(reference) for step in range(data.num_steps) for reference in data.step_examples(step)]
    assert int(data.plan["num_steps"]) == data.num_steps == 17
    assert int(data.plan["total_examples"]) == len(seen) == 51
    assert int(data.plan["total_tokens"]) == sum(len(example.tokens) for example in seen)
    assert int(data.plan["total_target_tokens"]) == sum(sum(example.mask) for example in seen)
    assert all(example.mask[0] == 0 and sum(example.mask) for example in seen)


@pytest.mark.parametrize(
    "name", ["plan.json", "data.json", "selection.bin", "offsets.bin", "tokens.bin", "mask.bin", "shard.json"]
)
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_damage_is_named_and_mended_by_planning_again(tmp_path: Path, name: str, damage: str) -> None:
    plan_directory = make(tmp_path)
    [path] = [
        path for path in (*plan_directory.iterdir(), *(tmp_path / "cache/tokens").glob("*/*")) if path.name == name
    ][:1]
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:-1])
    with pytest.raises(PlannedDataDamaged, match=name.replace(".", r"\.")):
        PlannedData.open(plan_directory)
    assert make(tmp_path) == plan_directory
    assert PlannedData.open(plan_directory).num_steps == 3


def test_a_selection_that_points_outside_is_refused(tmp_path: Path) -> None:
    plan_directory = make(tmp_path)
    path = plan_directory / "selection.bin"
    path.write_bytes(b"\xff" * len(path.read_bytes()))
    with pytest.raises(PlannedDataDamaged, match="not there"):
        PlannedData.open(plan_directory)


def test_offsets_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    plan_directory = make(tmp_path)
    data = PlannedData.open(plan_directory)
    shard = plan_directory / json.loads((plan_directory / "data.json").read_text())["sources"][0]["shard"]
    path = shard / "offsets.bin"
    content = bytearray(path.read_bytes())
    content[8:16] = (2**62).to_bytes(8, "little")
    shutil.copy(path, path.with_suffix(".old"))
    path.unlink()
    path.write_bytes(content)
    damaged = PlannedData.open(plan_directory)
    with pytest.raises(PlannedDataDamaged, match="example 0"):
        damaged.example((0, 0))
    assert data.example((0, 0)).tokens
