"""Settings, logs, the lock and the ready file."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from control_service.config import ENVIRONMENT_PREFIX, Settings, SettingsError, as_text, load_settings
from control_service.data_directory import Taken, announced, locked
from control_service.logs import MAX_TEXT_CHARACTERS, configure_logs


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in [key for key in os.environ if key.startswith(ENVIRONMENT_PREFIX)]:
        monkeypatch.delenv(key)


def test_a_flag_goes_before_the_environment_and_that_before_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CONTROL_GRACE_SECONDS", "3")
    monkeypatch.setenv("TUNESMITH_CONTROL_NODE", "a=host:1, b=[::1]:2")
    settings, print_only = load_settings(["--log-level", "debug"])
    assert (settings.grace_seconds, settings.log_level, print_only) == (3.0, "debug", False)
    assert [str(node) for node in settings.node] == ["a=host:1", "b=[::1]:2"]
    settings, print_only = load_settings(
        ["--grace-seconds", "4", "--node", "c=host:3", "--node", "d=host:4", "--print-config"]
    )
    assert (settings.grace_seconds, print_only) == (4.0, True)
    assert [node.name for node in settings.node] == ["c", "d"]


def test_the_defaults_are_safe_and_small() -> None:
    settings, _ = load_settings([])
    assert settings.address == "127.0.0.1:50051"
    assert settings.import_root is None
    assert settings.output_directory == settings.data_directory / "output"
    assert [str(node) for node in settings.node] == ["local=127.0.0.1:50052"]
    assert set(as_text(settings)) == set(Settings.model_fields)
    json.dumps(as_text(settings))


def test_no_node_can_be_asked_for() -> None:
    assert load_settings(["--node", ""])[0].node == ()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--address", "nothing"], "address"),
        (["--address", "127.0.0.1:99999"], "address"),
        (["--address", "0.0.0.0:50051"], "loopback"),
        (["--address", "example.org:50051"], "loopback"),
        (["--node", "50052"], "node"),
        (["--node", "a=host:1", "--node", "a=host:2"], "twice"),
        (["--node", "A=host:1"], "node"),
        (["--grace-seconds", "nan"], "grace_seconds"),
        (["--heartbeat-seconds", "0"], "heartbeat_seconds"),
        (["--log-level", "loud"], "log_level"),
        (["--max-watches", "many"], "max_watches"),
    ],
)
def test_a_bad_setting_is_named(argv: list[str], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        load_settings(argv)


def test_beyond_loopback_is_an_explicit_choice() -> None:
    assert load_settings(["--address", "0.0.0.0:1", "--allow-insecure-address"])[0].address == "0.0.0.0:1"


def test_an_unknown_variable_with_our_prefix_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CONTROL_DATA_DIR", "x")
    with pytest.raises(SettingsError, match="TUNESMITH_CONTROL_DATA_DIR"):
        load_settings([])


def test_an_unknown_flag_ends_by_the_parser() -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(["--colour", "blue"])
    assert caught.value.code == 2


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings([])[0].address = "127.0.0.1:1"


@pytest.fixture
def log_lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    configure_logs(service="control", level="info")
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_a_line_is_json_and_nothing_in_it_can_steer_a_terminal(log_lines: io.StringIO) -> None:
    nasty = "a\r\n\x1b[2J\x7f\u2028\u202eb"
    structlog.contextvars.bind_contextvars(request_id="r1")
    try:
        structlog.get_logger("t").info("hello", name=nasty, nothing=None)
        logging.getLogger("library").warning("said %s", nasty)
        logging.getLogger("library").debug("not said")
    finally:
        structlog.contextvars.clear_contextvars()
    text = log_lines.getvalue()
    assert len(text.splitlines()) == 2
    assert all(32 <= ord(character) < 127 or character == "\n" for character in text)
    first, second = (json.loads(line) for line in text.splitlines())
    assert first == {**first, "event": "hello", "name": nasty, "service": "control", "request_id": "r1"}
    assert "nothing" not in first
    assert second["event"] == f"said {nasty}"
    assert second["level"] == "warning"


def test_a_huge_text_is_cut_and_a_traceback_is_kept(log_lines: io.StringIO) -> None:
    try:
        raise ValueError("x" * 10)
    except ValueError:
        structlog.get_logger("t").exception("failed", text="y" * 10**6)
    line = json.loads(log_lines.getvalue())
    assert len(line["text"]) == MAX_TEXT_CHARACTERS
    assert "ValueError: xxxxxxxxxx" in line["exception"]


def test_a_locked_directory_is_refused_and_free_again_afterwards(tmp_path: Path) -> None:
    directory = tmp_path / "data" / "control"
    with locked(directory):
        with pytest.raises(Taken, match=str(os.getpid())), locked(directory):
            pass
        with pytest.raises(Taken), locked(directory):
            pass
    with locked(directory):
        pass


def test_the_ready_file_is_there_while_it_is_true(tmp_path: Path) -> None:
    path = tmp_path / "run" / "ready.json"
    with announced(path, address="127.0.0.1:7"):
        assert json.loads(path.read_text()) == {"address": "127.0.0.1:7", "pid": os.getpid()}
        assert [found.name for found in path.parent.iterdir()] == ["ready.json"]
    assert not path.exists()
    with announced(None, address="x"):
        pass


def test_the_service_starts_without_the_training_libraries() -> None:
    code = (
        "import sys, control_service.main; "
        "print([name for name in ('torch', 'transformers', 'peft', 'gpu_service') if name in sys.modules])"
    )
    finished = subprocess.run(  # a process of its own: this one may have imported anything
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stdout.strip() == "[]"
