"""Faults on a CUDA device: memory that runs out, runs that are cancelled or killed, kernels that never end; and what
has to come back afterwards by the driver's own number.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.engine_runs import TraitRows, Workspace, read_log
from tests.fakes.generations import InProcessEngine
from tests.fakes.gpu_runs import WAIT_SECONDS, wait_for
from tests.fakes.gpu_server import INSTALLATION, GpuServer
from tests.fakes.tiny_models import TinyOptions
from tests.faults.nodes import log_lines, running_node
from tunesmith.common.v1 import errors_pb2, event_pb2, plan_pb2
from tunesmith.gpu.v1 import run_service_pb2

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

_CUDA = {"type": "cuda", "index": 0}
# What may stay held, in the contract's words.
_SLACK_BYTES = 64 * 1024 * 1024
# Longer than an engine takes to start and load, which is progress too.
_HANG_LIMIT_SECONDS = 30
# An engine's start on a loaded machine, and a hang: twenty times the longest pass, which compiles kernels, if that is
# more than the limit.
_WATCH_SECONDS = 300
_ENDLESS = 1_000_000
# Of CUDA's allocator in torch: no more than this of its memory lies free between blocks, and it gives no less.
_LARGEST_GAP_BYTES, _SMALLEST_BLOCK_BYTES = 2**30, 512
# Long examples over a large vocabulary: what a pass takes is far more than the blocks that memory comes in.
_WIDE = TinyOptions(vocabulary_size=8192)
_LONG_ROWS = [{"prompt": f"{n} is", "completion": " left, right and" * 110} for n in range(160)]


@pytest.fixture(scope="module", autouse=True)
def _needs_a_device() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> InProcessEngine:
    return InProcessEngine(Workspace(root=tmp_path_factory.mktemp("workspace")))


class _Ballast:
    """Takes the device's free memory but `leave_bytes` once a run begins to train; None: none of it.

    Of 0 it takes what lies between the run's own blocks too, which the allocator has and the driver calls taken.
    """

    def __init__(self, leave_bytes: int | None) -> None:
        self._leave_bytes = leave_bytes
        self._held: list[Any] = []
        self.allocated_bytes = 0

    def __call__(self, notice: Mapping[str, Any]) -> None:
        import torch

        if notice.get("phase") != "TRAINING" or self._held:
            return
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self.allocated_bytes = torch.cuda.memory_allocated()
        if self._leave_bytes is None:
            return
        free, _ = torch.cuda.mem_get_info()
        self._take(max(free - self._leave_bytes, 0))
        size = _LARGEST_GAP_BYTES if self._leave_bytes == 0 else 0
        while size >= _SMALLEST_BLOCK_BYTES:
            try:
                self._take(size)
            except torch.OutOfMemoryError:
                size //= 2

    def _take(self, num_bytes: int) -> None:
        import torch

        self._held.append(torch.empty(num_bytes, dtype=torch.uint8, device="cuda"))


def _train_beside(workspace: Workspace, job_id: str, ballast: _Ballast, trainer: str) -> Any:
    from gpu_service.engine.resident import BaseShelf
    from gpu_service.engine.service import carry_out
    from gpu_service.engine.stopping import StopSwitch

    directory = workspace.make_run(
        job_id,
        options=_WIDE,
        training_type="lora",
        traits=[TraitRows(trait_type="coding", rows=_LONG_ROWS)],
        hyperparameters={"batch": {"examples": 128}, "num_steps": 2, "max_length": 512, "trainer": trainer},
        device=_CUDA,
    )
    carry_out(directory, shelf=BaseShelf(), switch=StopSwitch(), notify=ballast)
    return read_log(directory)


@pytest.mark.parametrize("trainer", ["fast", "reference"])
def test_memory_that_runs_out_makes_passes_smaller_and_is_named_when_one_example_is_too_much(
    engine: InProcessEngine, trainer: str
) -> None:
    from gpu_service.engine.training.out_of_memory import RECOMPUTING_MORE

    ballast = _Ballast(None)
    alone = _train_beside(engine.workspace, f"alone-{trainer}", ballast, trainer)
    assert alone.states[-1] == "SUCCEEDED", alone.payloads[-1]
    assert not alone.of("micro_batch_reduced")
    needed_bytes = alone.of("step")[-1].peak_memory_bytes - ballast.allocated_bytes
    assert needed_bytes > 4 * _SLACK_BYTES

    smaller = _train_beside(engine.workspace, f"smaller-{trainer}", _Ballast(needed_bytes // 2), trainer)
    assert smaller.states[-1] == "SUCCEEDED", smaller.payloads[-1]
    # The fast path can also keep less of a pass, which changes no bit, and does that before it halves any.
    recomputes = [event for event in smaller.of("warning") if event.code == RECOMPUTING_MORE]
    assert recomputes if trainer == "fast" else smaller.of("micro_batch_reduced")
    assert smaller.losses == pytest.approx(alone.losses, rel=1e-2)

    refused = _train_beside(engine.workspace, f"refused-{trainer}", _Ballast(0), trainer)
    failure = refused.of("run_state")[-1].failure
    assert refused.states[-1] == "FAILED"
    assert failure.reason == errors_pb2.ERROR_REASON_DEVICE_OUT_OF_MEMORY
    assert failure.fault == errors_pb2.FAULT_HARDWARE
    assert failure.exception_type.endswith("OutOfMemoryError")


def _used_bytes() -> int:
    """Memory in use on the device by the driver's own count, this process' included."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
        answer = subprocess.run(query, capture_output=True, check=True, text=True, timeout=WAIT_SECONDS)
        return int(answer.stdout) * 1024 * 1024
    # Its own context counts too, the same every time.
    program = "import torch; free, total = torch.cuda.mem_get_info(); print(total - free)"
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True, timeout=WAIT_SECONDS
    )
    return int(answer.stdout)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, engine: InProcessEngine) -> Iterator[GpuServer]:
    """A server on the device with the real engine, which hangs in a kernel when its job says so."""
    import gc

    import torch

    # What this process keeps is the same before and after.
    gc.collect()
    torch.cuda.empty_cache()
    with running_node(
        tmp_path_factory.mktemp("node"),
        real_engine="tests.fakes.kernel_hang",
        watch_seconds=_WATCH_SECONDS,
        hang_limit_seconds=_HANG_LIMIT_SECONDS,
    ) as server:
        yield server


@pytest.fixture
def node(server: GpuServer) -> Iterator[GpuServer]:
    """The server with a free device, whatever the test before left on it."""
    yield server
    for shim in server.shims():
        if shim["run_directory"] is not None:
            job_id = Path(shim["run_directory"]).parent.name
            server.stop_run("CANCEL", job_id=job_id, grace_seconds=2)
            server.watch_to_end(job_id)


def test_what_cancelled_and_killed_runs_held_comes_back(node: GpuServer) -> None:
    before = _used_bytes()
    node.start_run("01WARM", num_steps=2)
    assert node.watch_to_end("01WARM")[-1].run_state.state == event_pb2.RUN_STATE_SUCCEEDED
    base_line = _used_bytes()
    assert base_line > before
    [shim] = node.shims()

    node.start_run("01CANCEL", num_steps=_ENDLESS)
    node.wait_for_step(3, "01CANCEL")
    node.stop_run("CANCEL", job_id="01CANCEL")
    *_, released, last = node.watch_to_end("01CANCEL")
    assert last.run_state.state == event_pb2.RUN_STATE_CANCELLED
    assert not released.memory_released.engine_ended
    assert _used_bytes() <= base_line + _SLACK_BYTES
    assert [one["engine_pid"] for one in node.shims()] == [shim["engine_pid"]]

    node.start_run("01KILL", num_steps=_ENDLESS)
    node.wait_for_step(3, "01KILL")
    os.kill(shim["engine_pid"], signal.SIGKILL)
    failure = node.watch_to_end("01KILL")[-1].run_state.failure
    assert (failure.reason, failure.signal) == (errors_pb2.ERROR_REASON_ENGINE_KILLED, signal.SIGKILL)
    # Said only once the memory is back.
    assert _used_bytes() <= before + _SLACK_BYTES


def test_a_kernel_that_never_ends_is_a_hang(node: GpuServer) -> None:
    before = _used_bytes()
    node.start_run("01HANG", num_steps=_ENDLESS, script={"hang_at_step": 3})
    events = node.watch_to_end("01HANG")
    failure = events[-1].run_state.failure
    assert failure.reason == errors_pb2.ERROR_REASON_HANG
    assert failure.stage == "TRAINING"
    # Python's frames down to the call that waits for the device.
    lines = log_lines(events)
    assert any("_step" in line for line in lines), lines
    assert _used_bytes() <= before + _SLACK_BYTES
    assert not [payload for payload in events if payload.warning.code == "device-quarantined"]


def test_a_cancel_while_a_kernel_never_ends_kills_the_engine(node: GpuServer) -> None:
    before = _used_bytes()
    node.start_run("01STUCK", num_steps=_ENDLESS, script={"hang_at_step": 2})
    node.wait_for_step(1, "01STUCK")
    node.stop_run("CANCEL", job_id="01STUCK", grace_seconds=2)
    *_, released, last = node.watch_to_end("01STUCK")
    assert last.run_state.state == event_pb2.RUN_STATE_CANCELLED
    assert released.memory_released.engine_ended
    assert released.memory_released.resident_bytes == 0
    assert _used_bytes() <= before + _SLACK_BYTES


def test_the_memory_probe_measures_and_leaves_nothing(node: GpuServer) -> None:
    wait_for(lambda: not node.shims(), what="the last engine's end")
    before = _used_bytes()
    plan = node.runs.PlanRun(
        run_service_pb2.PlanRunRequest(
            spec=node.request(num_steps=3).spec,
            installation_id=INSTALLATION,
            level=plan_pb2.PLAN_LEVEL_EXACT,
            probe_memory=True,
        ),
        timeout=WAIT_SECONDS * 2,
    ).plan
    assert plan.memory_probe.peak_bytes > 0
    assert plan.memory_probe.step_tokens == plan.largest_step_tokens
    wait_for(lambda: _used_bytes() <= before + _SLACK_BYTES, what="the probe's memory")


# Who draws the dropout: the fast path takes its keys from the host's generator, PEFT's layers ask the device's.
@pytest.mark.parametrize(("trainer", "generator"), [("fast", "torch"), ("reference", "cuda")])
def test_a_resumed_run_draws_what_the_first_would_have_drawn(
    engine: InProcessEngine, trainer: str, generator: str
) -> None:
    import torch
    from safetensors.torch import load_file

    from gpu_service.engine.resident import BaseShelf
    from gpu_service.engine.service import carry_out
    from gpu_service.engine.stopping import StopSwitch

    workspace = engine.workspace
    hyperparameters: dict[str, Any] = {
        "num_steps": 4,
        "save_every_steps": 2,
        "keep_checkpoints": 3,
        "lora": {"rank": 4, "dropout": 0.5},
        "trainer": trainer,
    }
    shelf = BaseShelf()
    whole = workspace.make_run(f"drawn-{trainer}", hyperparameters=hyperparameters, device=_CUDA)
    carry_out(whole, shelf=shelf, switch=StopSwitch(), notify=lambda notice: None)
    log = read_log(whole)
    assert log.states[-1] == "SUCCEEDED", log.payloads[-1]
    states = [load_file(whole / f"checkpoints/step-{step:08d}/random.safetensors") for step in (2, 4)]
    assert not torch.equal(states[0][generator], states[1][generator])

    torch.manual_seed(99)
    rest = workspace.make_run(
        f"drawn-{trainer}",
        hyperparameters=hyperparameters,
        device=_CUDA,
        attempt=2,
        resume=workspace.resume_point(whole, 2),
    )
    carry_out(rest, shelf=shelf, switch=StopSwitch(), notify=lambda notice: None)
    resumed = read_log(rest)
    assert resumed.states[-1] == "SUCCEEDED", resumed.payloads[-1]
    again = load_file(rest / "checkpoints/step-00000004/random.safetensors")
    assert all(torch.equal(again[name], states[1][name]) for name in states[1])
    assert resumed.losses == pytest.approx({step: log.losses[step] for step in (3, 4)}, rel=1e-2)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_a_checkpoint_answers_over_a_quantized_base(engine: InProcessEngine, quantization: str) -> None:
    lora = {"rank": 4, "alpha": 64.0}
    directory = engine.workspace.make_run(
        f"checkpoint-{quantization}",
        hyperparameters={"quantization": {"method": quantization}, "lora": lora},
        device=_CUDA,
    )
    adapter = engine.train(directory)
    log = read_log(directory)
    assert log.states[-1] == "SUCCEEDED", log.payloads[-1]
    (checkpoint,) = (directory / "checkpoints").iterdir()
    options: dict[str, Any] = {
        "model": "tiny/llama",
        "device": _CUDA,
        "quantization": quantization,
        "compute_dtype": log.of("plan")[0].resolved.quantization.compute_dtype,
        "lora": lora,
    }
    question = "What is two plus two?"
    answered = engine.ask(question, adapter=checkpoint, **options)
    assert answered.last["finish_reason"] in ("STOP", "LENGTH"), answered.last
    assert answered.text == engine.ask(question, adapter=adapter, **options).text
    assert answered.text != engine.ask(question, **options).text


def test_the_driver_tells_what_nobody_holds(node: GpuServer) -> None:
    """The number that a shim compares before and behind an engine, through the library that lists the devices."""
    from gpu_service.devices import read_held_bytes

    # An engine of a test before may be giving its own back.
    before, held = _used_bytes(), read_held_bytes(0)
    assert 0 <= held <= max(before, _used_bytes()) + _SLACK_BYTES
