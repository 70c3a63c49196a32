"""What an adapter says of itself; that it loads elsewhere is `test_exports`' to show."""

from __future__ import annotations

import json
from typing import Any

from tests.fakes.engine_runs import Workspace


def test_adapter_says_where_it_comes_from(workspace: Workspace, run_in_process: Any) -> None:
    directory = workspace.make_run("card", chat=False, hyperparameters={"chat_template": "chatml"})
    log = run_in_process(directory)
    (plan,) = log.of("plan")
    adapter = directory / "artifacts/adapter"

    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny/llama"
    assert sorted(config["target_modules"]) == sorted(plan.resolved.lora.target_modules)
    card = (adapter / "README.md").read_text()
    assert plan.weights_digest == json.loads((directory / "run.json").read_text())["weights_digest"]
    for said in (plan.data_digest, plan.weights_digest, "arithmetic", "coding", '"rank": 4', "Held-out loss"):
        assert said in card
    for said in ("base_model_relation: adapter", "library_name: peft", "| base | 0 |", "| final | 2 |", "Mix: "):
        assert said in card
    assert str(workspace.root) not in card
    assert str(workspace.root) not in (adapter / "adapter_config.json").read_text()
    # The template that the project named goes with the adapter.
    assert "<|im_start|>" in (adapter / "chat_template.jinja").read_text()
    assert not list(adapter.rglob("*.bin"))
    (event,) = (event for event in log.of("artifact") if event.name == "adapter")
    assert {file.path for file in event.files} == {
        path.relative_to(adapter).as_posix() for path in adapter.rglob("*") if path.is_file()
    }
