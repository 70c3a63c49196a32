"""Commands and notices over a socket pair; nobody trains."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gpu_service.engine.control import ControlPipe
from gpu_service.engine.generation.order import GenerationOrder
from gpu_service.engine.pace import SLOWEST_BYTES_PER_SECOND, in_one_piece
from gpu_service.engine.stopping import StopMode, StopSwitch


@pytest.fixture
def ends() -> Iterator[tuple[ControlPipe, socket.socket]]:
    """The engine's pipe, reading, and the shim's end."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(30)
    with ours, theirs:
        pipe = ControlPipe(ours)
        pipe.start()
        yield pipe, theirs


def _send(shim: socket.socket, *commands: object) -> None:
    shim.sendall(b"".join(json.dumps(command).encode() + b"\n" for command in commands))


def _start(directory: str) -> dict[str, str]:
    return {"type": "start_run", "run_directory": directory}


def _stop(directory: str, mode: str) -> dict[str, str]:
    return {"type": "stop_run", "run_directory": directory, "mode": mode}


def test_runs_come_in_order(ends: tuple[ControlPipe, socket.socket]) -> None:
    pipe, shim = ends
    _send(shim, _start("/a"), _start("/b"))
    assert [pipe.next_order(), pipe.next_order()] == [Path("/a"), Path("/b")]


def test_a_command_in_pieces(ends: tuple[ControlPipe, socket.socket]) -> None:
    pipe, shim = ends
    line = json.dumps(_start("/a")).encode() + b"\n"
    shim.sendall(line[:7])
    shim.sendall(line[7:])
    assert pipe.next_order() == Path("/a")


def test_what_is_no_command_is_passed_over(
    ends: tuple[ControlPipe, socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    pipe, shim = ends
    shim.sendall(b"not json\n[]\n{}\n")
    _send(shim, {"type": "dance"}, {"type": "stop_run", "run_directory": "/a", "mode": "softly"}, _start("/b"))
    assert pipe.next_order() == Path("/b")
    assert len(caplog.records) == 5


def test_a_stop_reaches_its_run_only(ends: tuple[ControlPipe, socket.socket]) -> None:
    pipe, shim = ends
    switch = StopSwitch()
    pipe.begin(Path("/a"), switch)
    _send(shim, _stop("/b", "cancel"), _start("/next"))
    assert pipe.next_order() == Path("/next")
    assert switch.mode is None
    _send(shim, _stop("/a", "checkpoint"), _start("/next"))
    assert pipe.next_order() == Path("/next")
    assert switch.mode is StopMode.CHECKPOINT


def test_a_stop_that_came_before_its_run(ends: tuple[ControlPipe, socket.socket]) -> None:
    pipe, shim = ends
    _send(shim, _stop("/a", "cancel"), _stop("/a", "checkpoint"), _start("/a"))
    assert pipe.next_order() == Path("/a")
    switch = StopSwitch()
    pipe.begin(Path("/a"), switch)
    assert switch.mode is StopMode.CANCEL
    pipe.end()
    again = StopSwitch()
    pipe.begin(Path("/a"), again)
    assert again.mode is None


def test_shutdown_stops_the_run_in_hand_and_the_engine(ends: tuple[ControlPipe, socket.socket]) -> None:
    pipe, shim = ends
    switch = StopSwitch()
    pipe.begin(Path("/a"), switch)
    _send(shim, {"type": "shutdown", "grace_seconds": 1})
    assert pipe.next_order() is None
    assert switch.mode is StopMode.CHECKPOINT
    late = StopSwitch()
    pipe.begin(Path("/b"), late)
    assert late.mode is StopMode.CHECKPOINT


def test_a_closed_pipe_is_a_shutdown(ends: tuple[ControlPipe, socket.socket]) -> None:
    pipe, shim = ends
    shim.shutdown(socket.SHUT_WR)
    assert pipe.next_order() is None
    assert pipe.shutting_down


def test_notices_are_lines(ends: tuple[ControlPipe, socket.socket]) -> None:
    pipe, shim = ends
    pipe.notify({"type": "ready"})
    assert shim.recv(1000) == b'{"type":"ready"}\n'


def test_a_notice_to_nobody_harms_nothing(ends: tuple[ControlPipe, socket.socket]) -> None:
    pipe, shim = ends
    shim.close()
    for _ in range(3):
        pipe.notify({"type": "ready"})


def _generate(name: str) -> dict[str, str]:
    return {"type": "generate", "generation": name, "request": f"/{name}.json"}


def _next_generation(pipe: ControlPipe) -> GenerationOrder:
    order = pipe.next_order()
    assert isinstance(order, GenerationOrder)
    return order


def test_a_generation_is_cancelled_by_its_id_or_with_all(ends: tuple[ControlPipe, socket.socket]) -> None:
    pipe, shim = ends
    _send(shim, _generate("a"), _generate("b"), {"type": "cancel_generate", "generation": "b"}, _generate("c"))
    first, second, third = (_next_generation(pipe) for _ in range(3))
    assert (first.id, first.request_file) == ("a", Path("/a.json"))
    assert [order.switch.mode for order in (first, second, third)] == [None, StopMode.CANCEL, None]
    pipe.end_generation(first)
    _send(shim, {"type": "cancel_generate", "generation": None}, _generate("d"))
    assert _next_generation(pipe).switch.mode is None
    assert (first.switch.mode, third.switch.mode) == (None, StopMode.CANCEL)


def test_a_run_and_a_shutdown_end_generations(ends: tuple[ControlPipe, socket.socket]) -> None:
    pipe, shim = ends
    _send(shim, _generate("a"), _start("/run"), _generate("b"), {"type": "shutdown", "grace_seconds": 1})
    # Past the door that a shutdown closes: what was queued before it.
    first, run, second, end = (pipe._orders.get() for _ in range(4))
    assert (run, end) == (Path("/run"), None)
    for order in (first, second):
        assert isinstance(order, GenerationOrder)
        assert order.switch.mode is StopMode.CANCEL


def _said(shim: socket.socket) -> dict[str, object]:
    with shim.makefile("rb") as lines:
        said: dict[str, object] = json.loads(lines.readline())
    return said


def test_a_pause_is_announced_at_once_and_its_end_is_told(ends: tuple[ControlPipe, socket.socket]) -> None:
    pipe, shim = ends
    pipe.note_progress()
    assert _said(shim) == {"type": "alive"}
    switch = StopSwitch(pipe.note_progress, pipe.announce_pause)
    with in_one_piece(switch, 3 * SLOWEST_BYTES_PER_SECOND):
        assert _said(shim) == {"type": "alive", "next_pause_seconds": 3}
    # Not held back, although the last sign is not a second ago.
    assert _said(shim) == {"type": "alive"}


def test_only_a_shim_that_lives_clears_what_a_run_left(ends: tuple[ControlPipe, socket.socket]) -> None:
    pipe, shim = ends
    with ThreadPoolExecutor(1) as pool:
        cleared = pool.submit(pipe.clear, Path("/a"))
        assert _said(shim) == {"type": "clear_run", "run_directory": "/a"}
        _send(shim, {"type": "run_cleared", "run_directory": "/a"})
        assert cleared.result(30)
        again = pool.submit(pipe.clear, Path("/a"))
        assert _said(shim)["type"] == "clear_run"
        shim.shutdown(socket.SHUT_RDWR)
        assert not again.result(30)
    assert not pipe.clear(Path("/a"))
