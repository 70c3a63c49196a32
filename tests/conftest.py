"""Fixtures that more than one kind of test uses. Imports neither service and no training library."""

import os
import signal
from pathlib import Path

import pytest

from tests.fakes.real_model import obtain_smollm

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _children_hear_ctrl_c() -> None:
    """A shell's background jobs ignore SIGINT, and what ignores it hands that on to every child."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _children_find_the_packages() -> None:
    """Processes that tests start import from this checkout, installed or not."""
    parts = [str(ROOT), str(ROOT / "clients" / "python"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(part for part in parts if part)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own settings must not reach the services under test."""
    for name in list(os.environ):
        if name.startswith(("TUNESMITH_CONTROL_", "TUNESMITH_GPU_")) or name == "TUNESMITH_ADDRESS":
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def real_models() -> Path:
    """A models directory with SmolLM2-135M-Instruct, kept between runs."""
    directory = Path(os.environ.get("TUNESMITH_TEST_MODELS") or ROOT / ".cache" / "models")
    obtain_smollm(directory)
    return directory
