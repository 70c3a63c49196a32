"""What answers for a job that goes on: its newest copied checkpoint, also when that changes while it is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from control_service.app import inference, jobs
from control_service.app.inference_source import find_source
from control_service.domain.artifact import CheckpointStatus
from control_service.domain.generation import ChatMessage, GenerationRequest, GenerationSource
from tests.fakes.control_core import Core
from tests.fakes.control_node import FakeNode
from tests.integration.control_core.conftest import OpenCore


class ReadBefore:
    """A store whose first answer was read a moment ago."""

    def __init__(self, core: Core, earlier: GenerationRequest) -> None:
        self._core = core
        self._earlier: list[Any] = [earlier]

    async def read(self, work: Callable[[Any], Any]) -> Any:
        return self._earlier.pop() if self._earlier else await self._core.store.read(work)


async def _replicated(core: Core, node: FakeNode, job_id: str, step: int) -> None:
    node.run(job_id).checkpoint(step, path="weights.safetensors")

    def is_there(found: Any) -> bool:
        return any(c.step == step and c.status is CheckpointStatus.REPLICATED for c in found)

    while not is_there(await jobs.list_checkpoints(job_id, store=core.store)):
        await core.clock.sleep(0.01)


async def test_a_newer_checkpoint_takes_the_place_of_one_that_is_gone(open_core: OpenCore) -> None:
    node = FakeNode("a")
    core = await open_core(node)
    await core.reachable()
    job = await core.start((await core.project()).project_id)
    await core.running(job.job_id)
    source = GenerationSource(job_id=job.job_id)
    await _replicated(core, node, job.job_id, 20)
    earlier = await core.store.read(lambda tx: find_source(tx, source))
    assert earlier.adapter == "step-00000020"
    await _replicated(core, node, job.job_id, 40)
    (gone,) = earlier.adapter_files
    assert gone.sha256 not in core.blobs.blobs
    node.blobs.clear()

    answer = inference.generate(
        source,
        [ChatMessage(role="user", content="?")],
        {},
        store=ReadBefore(core, earlier),  # type: ignore[arg-type]  # reads alone
        nodes=core.runtime.nodes,
        blobs=core.blobs,
    )
    assert {answering.adapter async for answering, _ in answer} == {"step-00000040"}
