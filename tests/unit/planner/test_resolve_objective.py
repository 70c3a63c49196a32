"""Preference pairs go with objective `dpo`, adapters and nothing else; every other format goes with every other."""

from typing import Any

import pytest

from gpu_service.domain.errors import Refusal
from tests.fakes.checked_specs import make_spec, plan

PAIRS = ("preference",) * 3
DPO = {"objective": "dpo"}


def make(formats: tuple[str, ...] = PAIRS, **changes: Any) -> dict[str, Any]:
    """`formats` are those of the two trained datasets and of the one held out."""
    datasets = [
        {"dataset_id": at, "format": format, "num_examples": "60"} for at, format in enumerate(formats, start=1)
    ]
    return make_spec(**{"datasets": datasets, "hyperparameters": DPO, **changes})


@pytest.mark.parametrize(
    ("spec", "field", "message"),
    [
        (make(training_type="full"), "objective", "'full' changes; it goes with qlora, lora"),
        (make(training_type="standard"), "objective", "'full' changes"),
        (make(hyperparameters={**DPO, "loss_on": "all"}), "loss_on", "loss_on can only be 'targets'"),
        (make(("preference", "text", "preference")), "objective", "dataset 2 has format 'text'"),
        (make(("preference", "preference", "text")), "objective", "dataset 3 has format 'text'"),
        (make(hyperparameters={}), "objective", r"dataset 1 .* set hyperparameters\.objective to 'dpo'"),
        (make(("text", "text", "preference"), hyperparameters={"objective": "sft"}), "objective", "dataset 3 has pref"),
    ],
)
def test_what_does_not_go_together(spec: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(Refusal, match=message) as caught:
        plan(spec)
    assert (caught.value.reason, caught.value.field) == ("COMBINATION_NOT_ALLOWED", f"hyperparameters.{field}")


@pytest.mark.parametrize("training_type", ["qlora", "lora"])
def test_preference_pairs_train_adapters(training_type: str) -> None:
    planned = plan(make(training_type=training_type))
    assert planned.hyperparameters.objective == "dpo"
    assert planned.hyperparameters.dpo is not None


def test_every_format_but_pairs_goes_into_one_mix() -> None:
    planned = plan(make(("sharegpt", "instruction", "text"), hyperparameters={"dpo": {"beta": 0.2}}))
    assert "instruction data is rendered with the chat template as one user turn and one assistant turn" in (
        planned.warnings
    )
    assert "the dpo settings mean nothing for objective 'sft'" in planned.warnings
