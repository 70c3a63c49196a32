"""Which attention is chosen, by times that are told; and what FlashAttention-4 must pass before it may be chosen."""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch

from gpu_service.engine import trainers
from gpu_service.engine.fast_path import attention_choice, flash_attention_4, full_model
from gpu_service.engine.fast_path.attention import Bounds, TorchAttention
from gpu_service.engine.fast_path.attention_choice import AttentionChoice
from gpu_service.engine.fast_path.flash_attention_4 import Preparation
from gpu_service.engine.fast_path.model import FastModel
from gpu_service.engine.training.flat_attention import FlatLayout
from tests.fakes.engine_runs import Workspace


class _Named(TorchAttention):
    def __init__(self, name: str) -> None:
        self.name = name
        self.calls = 0

    def forward(self, *arguments: Any) -> Any:
        self.calls += 1
        return super().forward(*arguments)


class _Prepared:
    """Stands for FlashAttention-4's preparation: over when it is told."""

    def __init__(self, attention: _Named | None, problem: str = "") -> None:
        self.is_over = False
        self._result = attention, problem

    def __call__(self, query: torch.Tensor, key: torch.Tensor) -> _Prepared:
        assert (query.shape[1], key.shape[1]) == (4, 2)
        return self

    def wait(self) -> None:
        self.is_over = True

    def take(self) -> tuple[Any, str]:
        return self._result


def _pass(*lengths: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Bounds]:
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    parts = [torch.randn(sum(lengths), heads, 16) for heads in (4, 2, 2)]
    return parts[0], parts[1], parts[2], Bounds(starts=starts, longest=max(lengths), layout=FlatLayout(lengths=lengths))


def _make(times: dict[str, float], fails: type[Exception] | None = None) -> tuple[AttentionChoice, dict[str, _Named]]:
    """A choice among attentions that differ in name and in the time they are said to take."""
    named = {name: _Named(name) for name in ("flash", "cudnn", "newest")}
    asked: list[str] = []

    def clock(one: Any, *arguments: Any) -> float:
        asked.append(one.name)
        if fails is not None and one.name == "newest":
            raise fails("not of this length")
        return times[one.name]

    choice = AttentionChoice(clock)
    choice._flash, choice._cudnn = named["flash"], named["cudnn"]
    choice.asked = asked  # type: ignore[attr-defined]
    return choice, named


def _used(choice: AttentionChoice, *lengths: int) -> str:
    query, key, value, bounds = _pass(*lengths)
    output, kept = choice.forward(query, key, value, bounds)
    gradients = choice.backward(output, query, key, value, output, kept, bounds)
    assert [one.shape for one in gradients] == [query.shape, key.shape, value.shape]
    name: str = kept[0].name
    return name


def test_without_flash_attention_4_only_rows_of_one_length_have_a_choice() -> None:
    choice, _ = _make({"flash": 2.0, "cudnn": 1.0})
    asked: list[str] = choice.asked  # type: ignore[attr-defined]
    assert _used(choice, 300, 200) == "flash"
    assert _used(choice, 128, 128) == "flash"
    assert asked == []
    assert [_used(choice, 256, 256) for _ in range(3)] == ["cudnn"] * 3
    assert asked == ["flash", "cudnn"]
    (notice,) = choice.take_notices()
    assert "passes of 512 tokens in rows of 256 tokens: cuDNN (FlashAttention-2 2.00 ms, cuDNN 1.00 ms)" in notice
    # Other numbers of rows are passes of another kind.
    assert _used(choice, 256, 256, 256) == "cudnn"
    assert len(asked) == 4


def test_who_asks_for_the_same_bits_has_no_choice() -> None:
    choice, _ = _make({"flash": 2.0, "cudnn": 1.0})
    torch.use_deterministic_algorithms(True)
    try:
        assert _used(choice, 256, 256) == "flash"
    finally:
        torch.use_deterministic_algorithms(False)
    assert _used(choice, 256, 256) == "cudnn"


def test_rows_of_ever_other_lengths_are_timed_no_more() -> None:
    choice, _ = _make({"flash": 2.0, "cudnn": 1.0})
    used = [_used(choice, length) for length in range(256, 256 + 20)]
    assert used == ["cudnn"] * 16 + ["flash"] * 4
    assert _used(choice, 256) == "cudnn"
    assert len(choice.take_notices()) == 16


def test_flash_attention_4_is_timed_once_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = _Prepared(_Named("newest"))
    monkeypatch.setattr(attention_choice, "is_installed", lambda: True)
    monkeypatch.setattr(attention_choice, "Preparation", prepared)
    monkeypatch.setattr(attention_choice, "_CALLS_BEFORE_PREPARING", 3)
    choice, _ = _make({"flash": 2.0, "cudnn": 1.0, "newest": 1.5})
    asked: list[str] = choice.asked  # type: ignore[attr-defined]
    assert _used(choice, 256, 256) == "cudnn"
    assert [_used(choice, 300, 200) for _ in range(3)] == ["flash"] * 3
    assert choice._preparation is not None
    prepared.wait()
    assert [_used(choice, 300, 200) for _ in range(2)] == ["newest"] * 2
    assert asked == ["flash", "cudnn", "flash", "newest"]
    # What was chosen before is timed again; passes of a size like one before are not.
    assert _used(choice, 256, 256) == "cudnn"
    assert asked[4:] == ["flash", "cudnn", "newest"]
    assert _used(choice, 290, 200, 10) == "newest"
    assert len(asked) == 7
    assert len(choice.take_notices()) == 3


def test_flash_attention_4_that_cannot_be_used_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "is_installed", lambda: True)
    monkeypatch.setattr(attention_choice, "Preparation", _Prepared(None, "ImportError: no compiler"))
    choice, _ = _make({"flash": 1.0})
    query, key, *_ = _pass(5)
    choice.prepare(query, key, waits=True)
    assert _used(choice, 300, 200) == "flash"
    assert choice.take_notices() == ["FlashAttention-4 is installed and cannot be used: ImportError: no compiler"]


def test_flash_attention_4_that_fails_at_a_pass_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "is_installed", lambda: True)
    monkeypatch.setattr(attention_choice, "Preparation", _Prepared(_Named("newest")))
    choice, _ = _make({"flash": 1.0}, AssertionError)
    query, key, *_ = _pass(5)
    choice.prepare(query, key, waits=True)
    assert [_used(choice, 300, 200) for _ in range(2)] == ["flash"] * 2
    notices = choice.take_notices()
    assert any("given up: AssertionError: not of this length" in notice for notice in notices)


def test_a_pass_that_has_no_room_says_nothing_of_flash_attention_4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_choice, "is_installed", lambda: True)
    monkeypatch.setattr(attention_choice, "Preparation", _Prepared(_Named("newest")))
    choice, _ = _make({"flash": 2.0, "newest": 1.0}, torch.OutOfMemoryError)
    query, key, *_ = _pass(5)
    choice.prepare(query, key, waits=True)
    with pytest.raises(torch.OutOfMemoryError):
        _used(choice, 300, 200)
    choice._clock = lambda one, *_: {"flash": 2.0, "newest": 1.0}[one.name]
    assert _used(choice, 150, 100) == "newest"


def _library(factor: float) -> ModuleType:
    """The library's surface over torch's attention; what it gives is `factor` times too large."""
    module = ModuleType("flash_attn.cute")

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        causal: bool,
    ) -> tuple[torch.Tensor, None]:
        assert causal
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        lengths = tuple(cu_seqlens_q.diff().tolist())
        assert max(lengths) == max_seqlen_q == max_seqlen_k
        bounds = Bounds(starts=cu_seqlens_q, longest=max_seqlen_q, layout=FlatLayout(lengths=lengths))
        return factor * TorchAttention().forward(query, key, value, bounds)[0], None

    module.flash_attn_varlen_func = attend  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(("factor", "problem"), [(1.0, ""), (1.1, "apart from those of FlashAttention-2")])
def test_preparation_compares_it_first(factor: float, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn.cute", _library(factor))
    monkeypatch.setattr(flash_attention_4, "FlashAttention", TorchAttention)
    before = torch.get_rng_state()
    query, key, value, bounds = _pass(40, 20)
    after_draw = torch.get_rng_state()
    preparation = Preparation(query, key)
    preparation.wait()
    assert preparation.is_over
    attention, said = preparation.take()
    assert torch.equal(torch.get_rng_state(), after_draw)
    assert not torch.equal(before, after_draw)
    assert (attention is None) == bool(problem)
    assert problem in said
    if attention is not None:
        output, kept = attention.forward(query, key, value, bounds)
        plain = TorchAttention()
        expected, _ = plain.forward(query, key, value, bounds)
        gradient = torch.randn_like(output)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(
            attention.backward(gradient, query, key, value, output, kept, bounds),
            plain.backward(gradient, query, key, value, expected, None, bounds),
        )


def test_preparation_says_why_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    query, key, *_ = _pass(5)
    preparation = Preparation(query, key)
    preparation.wait()
    attention, said = preparation.take()
    assert attention is None
    assert "ModuleNotFoundError" in said or "ImportError" in said


class _Decides(AttentionChoice):
    """Says something of every pass through a layer."""

    def __init__(self) -> None:
        super().__init__(lambda *_: 1.0)
        self._flash = TorchAttention()
        self.num_said = 0

    def _choose(self, *arguments: Any) -> Any:
        self.num_said += 1
        self._notices.append(f"attention number {self.num_said}")
        return self._flash


@pytest.mark.parametrize("training_type", ["qlora", "full"])
def test_runs_say_what_is_chosen_until_their_end(
    training_type: str, workspace: Workspace, run_in_process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is chosen in the last evaluation too."""
    choice = _Decides()
    monkeypatch.setattr(trainers, "FastModel", partial(FastModel, attention=choice))

    class Chosen(full_model.FullModel):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, attention=choice, **options)

    # Imported by the runs that train every weight.
    monkeypatch.setattr(full_model, "FullModel", Chosen)
    directory = workspace.make_run(training_type, training_type=training_type, hyperparameters={"trainer": "fast"})
    log = run_in_process(directory)
    assert log.states[-1] == "SUCCEEDED"
    said = [event.message for event in log.of("log") if event.message.startswith("attention number")]
    assert said == [f"attention number {number}" for number in range(1, choice.num_said + 1)]
    assert said
