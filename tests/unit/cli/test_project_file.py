"""A project file is read strictly; every error names its line."""

import math

import pytest

from tunesmith_cli.project_file import ProjectFileError, read_project
from tunesmith_client import NotFound

GOOD = """\
name: demo
base_model: org/name
model_type: llama
training_type: qlora
output_directory: ./demo
traits:
  - trait_type: structure
    weight: 2
    datasets:
      - {dataset: structure-train, percentage: 100}
    held_out_datasets: [structure-held-out]
  - trait_type: units
    datasets:
      - dataset: 7
        percentage: 100.0
hyperparameters:
  num_steps: 60
  quantization: {method: nf4, double_quantization: true}
  lora: {rank: 8, target_modules: [q_proj, v_proj]}
  optimizer: {learning_rate: 2e-4}
  batch: {examples: 8}
sample_prompts:
  - {trait_type: units, prompt: "How far is it?", max_new_tokens: 32}
"""
IDS = {"structure-train": 3, "structure-held-out": 4, "7": 7}


def read(text: str) -> object:
    return read_project(text, source="p.yaml", dataset_id_of=IDS.__getitem__)


def test_names_become_ids_and_values_keep_their_types() -> None:
    project = read_project(GOOD, source="p.yaml", dataset_id_of=IDS.__getitem__)
    first, second = project.traits
    assert (first.weight, first.datasets[0].dataset_id, list(first.held_out_dataset_ids)) == (2.0, 3, [4])
    assert not second.HasField("weight")
    assert (second.datasets[0].dataset_id, second.datasets[0].percentage) == (7, 100.0)
    hyper = project.hyperparameters
    assert (hyper.num_steps, hyper.lora.rank, hyper.batch.examples) == (60, 8, 8)
    # YAML 1.1 would read this as text.
    assert hyper.optimizer.learning_rate == 2e-4
    assert hyper.quantization.double_quantization is True
    assert project.sample_prompts[0].max_new_tokens == 32


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("training_type: qlora", "trainingtype: qlora", 4, "unknown key `trainingtype`"),
        ("rank: 8", "ranks: 8", 19, "unknown key `hyperparameters.lora.ranks`"),
        ("rank: 8", "rank: eight", 19, "must be a whole number, not `eight`"),
        ("rank: 8", "rank: 8.5", 19, "must be a whole number"),
        ("rank: 8", 'rank: "8"', 19, "must be a whole number"),
        ("double_quantization: true", "double_quantization: yes", 18, "must be true or false"),
        ("learning_rate: 2e-4", "learning_rate: fast", 20, "must be a number"),
        ("name: demo", "name: [demo]", 1, "must be a single value"),
        ("name: demo", "name:", 1, "must be text"),
        ("name: demo", "name: demo\nname: again", 2, "given twice"),
        ("name: demo", "project_id: 3", 1, "unknown key `project_id`"),
        ("{rank: 8, target_modules: [q_proj, v_proj]}", "8", 19, "must be a mapping"),
        ("[q_proj, v_proj]", "q_proj", 19, "must be a list"),
        ("{dataset: structure-train, percentage: 100}", "{dataset: 7, dataset_id: 7}", 10, "given twice"),
        ("num_steps: 60", "num_steps: 60\n  num_epochs: 2", 18, "does not go together with `num_steps`"),
    ],
)
def test_an_error_names_the_line_and_the_key(old: str, new: str, line: int, says: str) -> None:
    assert old in GOOD
    with pytest.raises(ProjectFileError) as raised:
        read(GOOD.replace(old, new, 1))
    assert str(raised.value).startswith(f"p.yaml:{line}: ")
    assert says in str(raised.value)


def test_an_unknown_key_is_answered_with_those_that_are_known() -> None:
    with pytest.raises(ProjectFileError, match=r"known here:.*dropout.*rank"):
        read(GOOD.replace("rank: 8", "rnk: 8"))


def test_text_that_is_not_yaml_names_its_line() -> None:
    with pytest.raises(ProjectFileError, match=r"^p.yaml:2: "):
        read("name: demo\n  oops: [")


def test_an_empty_file_is_said() -> None:
    with pytest.raises(ProjectFileError, match="empty"):
        read("")


def test_a_dataset_that_is_not_there_is_named_with_its_line() -> None:
    def nobody(name: str) -> int:
        raise NotFound(f"no dataset is named {name!r}", reason="DATASET_NOT_FOUND")

    with pytest.raises(NotFound) as raised:
        read_project(GOOD, source="p.yaml", dataset_id_of=nobody)
    assert str(raised.value) == "DATASET_NOT_FOUND: p.yaml:10: no dataset is named 'structure-train'"


def test_a_number_that_is_none_is_left_to_the_service() -> None:
    project = read_project(GOOD.replace("2e-4", ".nan"), source="p.yaml", dataset_id_of=IDS.__getitem__)
    assert math.isnan(project.hyperparameters.optimizer.learning_rate)
