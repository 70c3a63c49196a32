"""Generations carried out in this process, as an engine's main thread does; the test plays pipe and server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fakes.engine_runs import Workspace


@dataclass(kw_only=True)
class Answered:
    """What a generation said."""

    notices: list[dict[str, Any]] = field(default_factory=list)
    ends_engine: bool = False

    @property
    def text(self) -> str:
        return "".join(notice.get("text", "") for notice in self.notices)

    @property
    def num_tokens(self) -> int:
        return sum(notice.get("num_tokens", 0) for notice in self.notices)

    @property
    def last(self) -> dict[str, Any]:
        return self.notices[-1]


class InProcessEngine:
    """What an engine's main thread does, called by the test."""

    def __init__(self, workspace: Workspace) -> None:
        from gpu_service.engine.resident import BaseShelf

        self.workspace = workspace
        self.shelf = BaseShelf()
        self._num_requests = 0

    def train(self, directory: Path) -> Path:
        """Carry out a run; its adapter's directory."""
        from gpu_service.engine.service import carry_out
        from gpu_service.engine.stopping import StopSwitch

        carry_out(directory, shelf=self.shelf, switch=StopSwitch(), notify=lambda notice: None)
        return directory / "artifacts" / "adapter"

    def ask(
        self,
        content: str | list[tuple[str, str]],
        *,
        model: str,
        adapter: Path | None = None,
        quantization: str = "none",
        on_notice: Callable[[dict[str, Any], Any], None] = lambda notice, switch: None,
        chat_template: str = "",
        device: Mapping[str, Any] | None = None,
        compute_dtype: str = "float32",
        lora: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Answered:
        """One generation; `on_notice` gets the switch that ends it."""
        from gpu_service.catalog import base_models
        from gpu_service.catalog.quantization import REGISTRY
        from gpu_service.engine.generation import service
        from gpu_service.engine.generation.order import GenerationOrder
        from gpu_service.engine.stopping import StopSwitch

        self._num_requests += 1
        directory = self.workspace.models_directory / model
        messages = [("user", content)] if isinstance(content, str) else content
        request = {
            "device": dict(device or {"type": "cpu", "index": -1}),
            "base_model": model,
            "model_directory": str(directory),
            "weights_digest": base_models.weights_digest(directory, self.workspace.root / "digests.json"),
            "cache_directory": str(self.workspace.root / "cache"),
            "model_type": "llama",
            "training_type": "lora" if quantization == "none" else "qlora",
            "quantization": {
                "method": quantization,
                "double_quantization": REGISTRY[quantization].supports_double_quantization,
                "compute_dtype": compute_dtype,
            },
            "adapter_directory": None if adapter is None else str(adapter),
            "lora": {"rank": 16, "alpha": 32.0, **(lora or {})},
            "chat_template": chat_template,
            "messages": [{"role": role, "content": text} for role, text in messages],
            "sampling": {
                "max_new_tokens": 12,
                "temperature": 0.0,
                "top_p": 1.0,
                "top_k": 0,
                "seed": 0,
                "stop": [],
                **sampling,
            },
        }
        path = self.workspace.root / f"request-{self._num_requests}.json"
        path.write_text(json.dumps(request), encoding="utf-8")
        switch = StopSwitch()
        answered = Answered()

        def notify(notice: dict[str, Any]) -> None:
            answered.notices.append(notice)
            on_notice(notice, switch)

        order = GenerationOrder(id="g", request_file=path, arrival_seconds=time.monotonic(), switch=switch)
        answered.ends_engine = service.carry_out(order, shelf=self.shelf, notify=notify)
        return answered
