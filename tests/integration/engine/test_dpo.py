"""Direct preference optimization: its numbers against a computation by hand, and that it teaches."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from gpu_service.domain.planned_data import Example
from gpu_service.engine.artifacts.report import draw
from gpu_service.engine.training.batches import MicroBatchLimit, collate, split
from gpu_service.engine.training.flat_attention import attending_within_sequences
from gpu_service.engine.training.losses import LossTally
from gpu_service.engine.training.objectives import make_objective
from gpu_service.engine.training.progress import TrainingProgress
from tests.fakes.engine_runs import TraitRows, Workspace
from tests.fakes.planned_rows import PlannedRows, make_pair
from tunesmith.common.v1 import training_spec_pb2

_VOCABULARY = 128
_BETA, _SMOOTHING = 0.3, 0.1


def _make_model(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    config.lora_dropout = dropout
    model = get_peft_model(base, config)
    # An adapter begins as nothing, and would be its own reference.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model.train()


@pytest.fixture
def pairs() -> list[Example]:
    draw = random.Random(3)
    made = []
    for prompt, chosen, rejected in [(4, 6, 3), (2, 1, 9), (7, 5, 5), (3, 2, 8)]:
        start = [draw.randrange(_VOCABULARY) for _ in range(prompt)]
        answers = [[draw.randrange(_VOCABULARY) for _ in range(length)] for length in (chosen, rejected)]
        made.append(make_pair(start, *answers))
    return made


def _log_likelihood(model: Any, tokens: list[int], prompt_length: int) -> torch.Tensor:
    """Of the answer, by transformers alone: log softmax, one token after the other."""
    logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].double()
    terms = [logits[place - 1].log_softmax(-1)[tokens[place]] for place in range(prompt_length, len(tokens))]
    return torch.stack(terms).sum()


def _by_hand(model: Any, pair: Example) -> tuple[torch.Tensor, float, float]:
    """Loss and both rewards of a pair, from the paper's formula."""
    tokens, start = pair.tokens.tolist(), pair.rejected_start
    prompt_length = pair.mask.tolist().index(1)
    answers = [tokens[:start], tokens[start:]]
    policy = [_log_likelihood(model, answer, prompt_length) for answer in answers]
    with torch.no_grad(), model.disable_adapter():
        reference = [_log_likelihood(model, answer, prompt_length) for answer in answers]
    ratios = [one - other for one, other in zip(policy, reference, strict=True)]
    margin = _BETA * (ratios[0] - ratios[1])
    likely, unlikely = -torch.log(1 / (1 + torch.exp(-margin))), -torch.log(1 / (1 + torch.exp(margin)))
    loss = (1 - _SMOOTHING) * likely + _SMOOTHING * unlikely
    chosen, rejected = (_BETA * ratio.item() for ratio in ratios)
    return loss, chosen, rejected


def _objective() -> Any:
    dpo = training_spec_pb2.Dpo(beta=_BETA, label_smoothing=_SMOOTHING)
    return make_objective(training_spec_pb2.Hyperparameters(objective="dpo", dpo=dpo))


@pytest.mark.parametrize("examples", [1, 3, 4])
def test_losses_rewards_and_gradients_are_those_of_the_formula(pairs: list[Example], examples: int) -> None:
    model, rows, objective = _make_model(), PlannedRows(pairs, traits=("polite", "short")), _objective()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tally, total = LossTally(), torch.zeros((), dtype=torch.float64)
    with attending_within_sequences(model):
        for part in split(rows.as_data(), rows.references, MicroBatchLimit(examples=examples)):
            batch = collate(rows.as_data(), part)
            outcome = objective.forward(model, batch)
            total = total + outcome.total
            assert objective.weights(batch) == (1,) * len(part)
            tally.add(batch, objective.weights(batch), outcome.values.tolist(), rows.sources)
    gradients = torch.autograd.grad(total / len(pairs), trained)
    expected = [_by_hand(model, pair) for pair in pairs]
    losses = torch.stack([loss for loss, _, _ in expected])

    assert tally.mean == pytest.approx(losses.mean().item(), rel=1e-5)
    assert [value.loss for value in tally.by_trait()] == pytest.approx(
        [losses[0::2].mean().item(), losses[1::2].mean().item()], rel=1e-5
    )
    assert [value.num_pairs for value in tally.by_dataset()] == [2, 2]
    assert tally.num_target_tokens == sum(sum(pair.mask) for pair in pairs)
    metrics = tally.preference()
    assert metrics is not None
    assert metrics.num_pairs == 4
    assert metrics.reward_accuracy == sum(chosen > rejected for _, chosen, rejected in expected) / 4
    assert 0 < metrics.reward_accuracy < 1
    assert metrics.chosen_reward == pytest.approx(sum(chosen for _, chosen, _ in expected) / 4, rel=1e-4)
    assert metrics.rejected_reward == pytest.approx(sum(rejected for _, _, rejected in expected) / 4, rel=1e-4)
    for one, other in zip(gradients, torch.autograd.grad(losses.mean(), trained), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_the_reference_has_no_dropout_and_leaves_the_model_in_training(pairs: list[Example]) -> None:
    model, objective = _make_model(dropout=0.5), _objective()
    model.base_model.model.config.attention_dropout = 0.5
    rows = PlannedRows(pairs)
    batch = collate(rows.as_data(), rows.references)
    reward_columns = []
    with attending_within_sequences(model):
        for _ in range(2):
            torch.manual_seed(11)
            reward_columns.append(objective.forward(model, batch).values[:, 1:])
        other = objective.forward(model, batch).values[:, 1:]

    # The reference draws nothing: with the same seed the policy's dropout is the same, and with another it differs.
    assert torch.equal(*reward_columns)
    assert not torch.equal(reward_columns[0], other)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name)


def _preferences(numbers: range) -> list[dict[str, str]]:
    """The chosen answer is a word, the rejected one a number."""
    words = ["yes", "no", "add", "fox", "dog"]
    return [
        {"prompt": f"What is {n}?", "chosen": f" {words[n % 5]} it is", "rejected": f" {n} and {n}"} for n in numbers
    ]


@pytest.mark.parametrize("training_type", ["lora", "qlora"])
def test_training_raises_reward_accuracy(training_type: str, workspace: Workspace, run_in_process: Any) -> None:
    directory = workspace.make_run(
        f"dpo-{training_type}",
        training_type=training_type,
        hyperparameters={
            "objective": "dpo",
            "num_steps": 8,
            "batch": {"examples": 6, "micro_batch_tokens": "64"},
            "evaluate_every_steps": 4,
        },
        traits=[
            TraitRows(
                trait_type=trait,
                rows=_preferences(range(start, start + 18)),
                held_out=_preferences(range(start + 100, start + 106)),
                format="preference",
            )
            for trait, start in (("polite", 0), ("short", 300))
        ],
    )
    log = run_in_process(directory)

    assert log.states[-1] == "SUCCEEDED", log.payloads[-1]
    # At first the adapter is nothing: every reward is 0, and every pair costs log 2.
    first = log.of("step")[0]
    assert first.loss == pytest.approx(math.log(2), rel=1e-6)
    assert first.preference.reward_accuracy == 0
    before, after = log.of("evaluation")[0], log.of("evaluation")[-1]
    assert before.loss == pytest.approx(math.log(2), rel=1e-6)
    assert after.loss < before.loss - 0.1
    assert after.preference.reward_accuracy > 0.9 > before.preference.reward_accuracy
    assert after.preference.chosen_reward > after.preference.rejected_reward
    assert after.preference.num_pairs == 12
    for event in log.of("step"):
        assert event.preference.num_pairs == event.num_examples == 6
        for values in (event.trait_losses, event.dataset_losses):
            weighted = sum(value.loss * value.num_pairs for value in values)
            assert weighted / sum(value.num_pairs for value in values) == pytest.approx(event.loss, rel=1e-12)
        assert sum(value.num_target_tokens for value in event.dataset_losses) == event.num_target_tokens
    assert draw(TrainingProgress(), "dpo").axes[0].get_ylabel() == "loss (nats per pair)"
    (plan,) = log.of("plan")
    (realized,) = log.of("realized")
    assert realized.total_target_tokens == plan.total_target_tokens
