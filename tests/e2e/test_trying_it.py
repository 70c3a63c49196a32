"""From a trained job to its answers, with the real engine on a tiny model: the example of the documents, a run that
comes in between, and a job that is paused.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.conftest import ROOT
from tests.fakes.pair import running_pair, wait_for
from tests.fakes.tiny_models import place_drawn
from tunesmith.common.v1 import event_pb2, training_spec_pb2
from tunesmith_cli.main import main
from tunesmith_client import Client, ResourceExhausted

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]


def ask_on(client: Client, parts: Iterable[object], base_model: str) -> NoReturn:
    """Read an answer, and ask for the next, until that is refused."""
    while True:
        list(parts)
        parts = client.inference.generate("go on", base_model=base_model, max_new_tokens=480)


def test_a_job_is_asked_and_a_run_goes_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base_model = place_drawn(tmp_path / "models")
    with running_pair(tmp_path / "data", tmp_path / "models", base_model) as pair:
        settings: dict[str, Any] = {
            "optimizer": training_spec_pb2.Optimizer(learning_rate=0.05),
            "lora": training_spec_pb2.Lora(rank=4),
            "num_steps": 3,
        }
        client = pair.client
        job = pair.start("asked", **settings)
        client.jobs.wait(job.job_id)
        (engine,) = pair.engines()

        # The example of the documents, as it stands.
        text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
        (example,) = [found for found in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "inference" in found]
        command = [sys.executable, "-c", example.replace("127.0.0.1:50051", pair.pair.address)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        assert re.search(r"while its base says '.*' \((LENGTH|STOP) after \d+ tokens\)", result.stdout, re.DOTALL)

        options = ["--job", job.job_id, "--compare-base", "--max-new-tokens", "16", "--address", pair.pair.address]
        assert main(["chat", *options, "--prompt", "What is 2 plus 2?", "--output", "json"]) == 0
        adapter, base = json.loads(capsys.readouterr().out)
        assert adapter["text"] in result.stdout
        assert adapter["text"] != base["text"]
        assert adapter["statistics"]["warm"] is base["statistics"]["warm"] is True

        # A run arrives while one long answer follows the other.
        project = pair.project("following", **settings)
        parts = client.inference.generate("go on", base_model=base_model, max_new_tokens=480, temperature=50.0)
        next(parts)
        following = client.jobs.start(project.project_id)
        with pytest.raises(ResourceExhausted) as caught:
            ask_on(client, parts, base_model)
        assert caught.value.reason == "NODE_BUSY"
        events = list(client.jobs.watch(following.job_id))
        assert client.jobs.get(following.job_id).state == event_pb2.JOB_STATE_SUCCEEDED
        weights = [
            event.payload.loading.details
            for event in events
            if event.kind == event_pb2.EVENT_KIND_LOADING
            and event.payload.loading.stage == event_pb2.LOADING_STAGE_WEIGHTS
            and event.payload.loading.status == event_pb2.STAGE_STATUS_FINISHED
        ]
        assert [details.get("resident") for details in weights] == ["true"]
        assert [process.pid for process in pair.engines()] == [engine.pid]
        wait_for("no request", lambda: not list((pair.node_directory / "requests").iterdir()))

        # One that is paused answers by its newest checkpoint.
        paused = pair.start("paused", **settings | {"num_steps": 1000}).job_id
        next(event for event in client.jobs.watch(paused) if event.kind == event_pb2.EVENT_KIND_STEP)
        client.jobs.pause(paused)
        wait_for("the pause", lambda: client.jobs.get(paused).state == event_pb2.JOB_STATE_PAUSED)
        options[1] = paused
        assert main(["chat", *options, "--prompt", "What is 2 plus 2?", "--output", "json"]) == 0
        checkpoint, base = json.loads(capsys.readouterr().out)
        assert re.fullmatch(r"step-\d{8}", checkpoint["adapter"])
        assert not base["adapter"]
        assert checkpoint["text"] != base["text"]
        client.jobs.cancel(paused)
