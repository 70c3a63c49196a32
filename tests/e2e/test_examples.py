"""Every example runs as it stands, against a running pair."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.fakes.pair import PairUnderTest

pytestmark = pytest.mark.timeout(180)

EXAMPLES = ROOT / "clients" / "python" / "examples"


def run_example(name: str, *arguments: str, directory: Path) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=150)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_each_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"quickstart.py", "watch_progress.py", "raw_stubs.py"}


def test_the_examples(stub_pair: PairUnderTest, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} + {n}?", "completion": f"{n + n}"} for n in range(30)]
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    address = stub_pair.pair.address
    # Twice: who tries it changes something and tries again.
    for _ in range(2):
        out = run_example("quickstart.py", str(file), address, stub_pair.base_model, directory=tmp_path)
        assert "step 4 of 4" in out
        assert (tmp_path / out.splitlines()[-1]).is_file()
    job, _ = stub_pair.client.jobs.list()
    out = run_example("watch_progress.py", job.job_id, address, directory=tmp_path)
    assert out.splitlines()[-2:] == ["job SUCCEEDED", "4 steps"]
    out = run_example("raw_stubs.py", address, directory=tmp_path)
    for line in (
        f"model {stub_pair.base_model}: ",
        "project 1: quickstart-",
        f"job {job.job_id}: JOB_STATE_SUCCEEDED",
    ):
        assert line in out


def test_the_recipe_for_health_and_reflection_in_operations(stub_pair: PairUnderTest) -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for address in (stub_pair.pair.address, stub_pair.pair.gpu_address):
        command = [sys.executable, "-c", recipe.replace("127.0.0.1:50051", address)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        lines = result.stdout.split()
        assert lines[0] == "SERVING"
        assert any(line.startswith("tunesmith.") for line in lines)
