"""Passes recorded as CUDA graphs: the same bits as their kernels launched one by one, and no wait for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

# Several passes of one frame, of as many tokens as it has and of fewer.
_PASSES = ((100, 156), (60, 61, 62, 50), (128, 128), (30,) * 7)


@pytest.fixture(autouse=True)
def _on_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)


def _make_recorder() -> Any:
    """CUDA graphs whatever they take, which can be switched to launching what they recorded."""
    import torch

    from gpu_service.engine.fast_path.recorder import CudaRecorder, Took

    class Switching(CudaRecorder):
        launches = False
        num_plays = 0

        def record(self, work: Callable[[], None]) -> Callable[[], None]:
            replay = super().record(work)

            def play() -> None:
                self.num_plays += 1
                (work if self.launches else replay)()

            return play

        def time(self, work: Callable[[], None]) -> Took:
            plays = self.num_plays
            super().time(work)
            whole = 1.0 if self.num_plays == plays else 0.5
            return Took(handing_out=whole, whole=whole)

    return Switching(torch.device("cuda", 0))


def _make(
    dtype: str, recorder: Any, *, dropout: float = 0.0, attention: Any = None, **settings: Any
) -> tuple[Any, Any]:
    import torch

    from gpu_service.engine.fast_path.model import FastModel, FastSettings
    from tests.fakes.fast_models import hold_in_nf4, make_peft

    kind = getattr(torch, dtype)
    quantize = (lambda base: hold_in_nf4(base, device="cuda")) if dtype == "bfloat16" else None
    model = make_peft("qwen3", dtype=kind, quantize=quantize).to("cuda")
    if dropout:
        for module in model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = torch.nn.Dropout(dropout)
    fast = FastModel(
        model,
        FastSettings(
            device=torch.device("cuda", 0),
            compute_dtype=kind,
            keeps_weights=False,
            **{"records": recorder is not None, **settings},
        ),
        attention=attention,
        recorder=recorder,
    )
    return model, fast.train()


def _run(model: Any, fast: Any, lengths: tuple[int, ...]) -> tuple[Any, dict[str, Any]]:
    from tests.fakes.fast_models import fast_gradients, nats
    from tests.fakes.flat_models import VOCABULARY_SIZE
    from tests.fakes.planned_rows import PlannedRows, make_examples

    found = nats(fast, PlannedRows(make_examples(lengths, vocabulary_size=VOCABULARY_SIZE, seed=3)), device="cuda")
    return found.detach(), fast_gradients(model, fast, found.sum() / 100)


def _error(found: dict[str, Any], expected: dict[str, Any]) -> float:
    import torch

    apart = torch.cat([(found[name] - expected[name]).flatten() for name in expected])
    return float(apart.norm() / torch.cat([value.flatten() for value in expected.values()]).norm())


def _record_all(model: Any, fast: Any) -> None:
    for lengths in _PASSES * 2:
        _run(model, fast, lengths)


@pytest.mark.parametrize("recomputes", [False, True])
def test_played_is_launched_to_the_bit(recomputes: bool) -> None:
    import torch

    recorder = _make_recorder()
    model, fast = _make("bfloat16", recorder, recomputes=recomputes)
    _record_all(model, fast)
    for lengths in _PASSES:
        plays = recorder.num_plays
        recorder.launches = False
        found, gradients = _run(model, fast, lengths)
        again, _ = _run(model, fast, lengths)
        recorder.launches = True
        expected, expected_gradients = _run(model, fast, lengths)
        assert recorder.num_plays == plays + 6
        assert torch.equal(found, expected)
        assert torch.equal(found, again)
        # Attention's backward kernel adds in no fixed order.
        assert _error(gradients, expected_gradients) < 1e-3


def test_rows_of_one_length_are_played_with_their_own_kernels() -> None:
    """cuDNN's, which go forward and back by way of autograd."""
    import torch

    from gpu_service.engine.fast_path.attention import CudnnAttention
    from gpu_service.engine.fast_path.attention_choice import AttentionChoice

    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("cuDNN's kernels are tried from Hopper on")
    recorder = _make_recorder()
    choice = AttentionChoice(lambda one, *_: 0.0 if isinstance(one, CudnnAttention) else 1.0)
    model, fast = _make("bfloat16", recorder, attention=choice)
    even, others = (256, 256), (256, 250)
    for lengths in (even, others) * 3:
        _run(model, fast, lengths)
    (said,) = [notice for notice in choice.take_notices() if "cuDNN" in notice]
    assert "passes of 512 tokens in rows of 256 tokens" in said
    for lengths in (even, others, even):
        plays = recorder.num_plays
        recorder.launches = False
        found, gradients = _run(model, fast, lengths)
        recorder.launches = True
        expected, expected_gradients = _run(model, fast, lengths)
        assert recorder.num_plays == plays + 4
        assert torch.equal(found, expected)
        assert _error(gradients, expected_gradients) < 1e-3


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_played_is_what_it_is_without_a_recorder(dropout: float) -> None:
    """Filled up, with products of another height; masks of dropout are the same ones."""
    import torch

    tolerance = 3e-2
    recorder = _make_recorder()
    model, fast = _make("bfloat16", recorder, dropout=dropout)
    _record_all(model, fast)
    plain_model, plain = _make("bfloat16", None, dropout=dropout)
    for lengths in _PASSES:
        plays = recorder.num_plays
        torch.manual_seed(5)
        found, gradients = _run(model, fast, lengths)
        assert recorder.num_plays == plays + 2
        torch.manual_seed(5)
        expected, expected_gradients = _run(plain_model, plain, lengths)
        assert float((found - expected).norm() / expected.norm()) < tolerance
        assert _error(gradients, expected_gradients) < tolerance


def test_measured_passes_are_played() -> None:
    import torch

    from tests.fakes.fast_models import nats
    from tests.fakes.flat_models import VOCABULARY_SIZE
    from tests.fakes.planned_rows import PlannedRows, make_examples

    recorder = _make_recorder()
    _, fast = _make("bfloat16", recorder)
    rows = [PlannedRows(make_examples(one, vocabulary_size=VOCABULARY_SIZE, seed=3)) for one in _PASSES]
    found: list[list[Any]] = []
    with torch.no_grad():
        for recorder.launches in (False, False, False, True):
            plays = recorder.num_plays
            found.append([nats(fast, one, device="cuda") for one in rows])
            with fast.disable_adapter():
                found[-1] += [nats(fast, one, device="cuda") for one in rows]
    assert recorder.num_plays == plays + 2 * len(_PASSES)
    assert all(torch.equal(one, other) for one, other in zip(found[2], found[3], strict=True))
    assert all(torch.allclose(one, other, rtol=1e-2) for one, other in zip(found[0], found[2], strict=True))
    assert not torch.equal(found[3][0], found[3][len(_PASSES)])


def test_no_played_step_waits_for_the_device() -> None:
    import torch

    recorder = _make_recorder()
    model, fast = _make("bfloat16", recorder)
    _record_all(model, fast)
    plays = recorder.num_plays
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for lengths in _PASSES:
            _run(model, fast, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert recorder.num_plays == plays + 2 * len(_PASSES)


def test_recordings_outlive_what_is_given_back_and_leave_when_they_are_given_up() -> None:
    import torch

    from gpu_service.engine.devices import select
    from gpu_service.engine.request import DeviceChoice

    device = select(DeviceChoice(type="cuda", index=0))
    recorder = _make_recorder()
    model, fast = _make("bfloat16", recorder)
    _record_all(model, fast)
    before, _ = _run(model, fast, _PASSES[0])
    device.give_back()
    # Whatever took the place of what was given back is not written over.
    taken = [torch.full((2**20,), 7.0, device="cuda") for _ in range(64)]
    after, _ = _run(model, fast, _PASSES[0])
    torch.cuda.synchronize()
    assert torch.equal(before, after)
    assert all(bool((one == 7.0).all()) for one in taken)
    del taken
    device.give_back()
    held = device.held_bytes()
    assert fast.recompute_more()
    device.give_back()
    assert device.held_bytes() < held


def test_cuda_measures_by_itself() -> None:
    """A model whose kernels are nothing is played in less time than it is launched in."""
    import torch

    from gpu_service.engine.fast_path.recorder import CudaRecorder

    model, fast = _make("bfloat16", CudaRecorder(torch.device("cuda", 0)))
    _record_all(model, fast)
    notices = fast.take_notices()
    assert any("CUDA graphs" in notice for notice in notices), notices


def test_float32_is_launched() -> None:
    """Its attention is told on the host where sequences begin."""
    model, fast = _make("float32", None, records=True)
    _record_all(model, fast)
    assert fast.take_notices() == []


def test_what_recordings_hold_is_counted_and_comes_back_with_the_last() -> None:
    """Measured ones too: what passes take is what they are let have, and no more than that is called free."""
    import gc

    import torch

    from tests.fakes.fast_models import nats
    from tests.fakes.flat_models import VOCABULARY_SIZE
    from tests.fakes.planned_rows import PlannedRows, make_examples

    recorder = _make_recorder()
    _, fast = _make("bfloat16", recorder)
    rows = PlannedRows(make_examples((700, 900, 448), vocabulary_size=VOCABULARY_SIZE, seed=3))
    with torch.no_grad():
        taken = recorder.taken_bytes(lambda: nats(fast, rows, device="cuda"))
        for _ in range(3):
            nats(fast, rows, device="cuda")
    held = recorder.held_bytes()
    assert recorder.num_plays > 0
    # A pool has gaps of its own, and grows by pieces.
    assert 0 < held <= 2 * taken + 64 * 2**20
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    reserved, (free, _) = torch.cuda.memory_reserved(), torch.cuda.mem_get_info()
    assert recorder.free_bytes() <= free + max(reserved - torch.cuda.memory_allocated() - held, 0)
    assert "kernel by kernel" in fast.give_up_recordings()
    gc.collect()
    torch.cuda.empty_cache()
    assert reserved - torch.cuda.memory_reserved() >= held


def test_what_cannot_be_captured_leaves_torch_as_it_was() -> None:
    """Numbers are drawn, memory that two streams use comes back, and what is recorded next is played."""
    import torch

    from gpu_service.engine.fast_path.recorder import CudaRecorder

    recorder = CudaRecorder(torch.device("cuda", 0))
    torch.manual_seed(1)
    expected = torch.rand(8, device="cuda")
    torch.manual_seed(1)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        recorder.record(torch.cuda.synchronize)
    assert torch.equal(torch.rand(8, device="cuda"), expected)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    shared = torch.empty(2**24, dtype=torch.uint8, device="cuda")
    shared.record_stream(torch.cuda.Stream())
    del shared
    torch.cuda.synchronize()
    # Events of streams are asked for when memory is.
    kept = torch.empty(2**20, dtype=torch.uint8, device="cuda")
    assert torch.cuda.memory_allocated() == before + len(kept)
    counter = torch.zeros((), device="cuda")

    def count() -> None:
        counter.add_(1)

    play = recorder.record(count)
    for _ in range(3):
        play()
    assert float(counter) == 3


def test_nothing_is_collected_while_a_recording_is_made() -> None:
    """What a collection frees may have to be waited for, which cannot be captured."""
    import gc

    import torch

    from gpu_service.engine.fast_path.recorder import CudaRecorder

    recorder = CudaRecorder(torch.device("cuda", 0))
    recording, collected = [], []

    def work() -> None:
        recording.append(True)
        for _ in range(100):
            loop: list[object] = []
            loop.append(loop)
        counter.add_(1)
        recording.clear()

    counter = torch.zeros((), device="cuda")
    thresholds = gc.get_threshold()
    gc.callbacks.append(lambda *_: collected.append(bool(recording)))
    gc.set_threshold(1)
    try:
        recorder.record(work)
        # As before: here it collects.
        [[one] for one in range(100)]
    finally:
        gc.set_threshold(*thresholds)
        del gc.callbacks[-1]
    assert collected
    assert not any(collected)
