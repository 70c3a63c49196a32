"""Generate over a fake node: what answers, which node is asked, what is refused, and that a cancel gets there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from control_service.config import NodeAddress
from tests.fakes.control import Client, control, error_info, is_step, violated_fields
from tests.fakes.gpu_node import MODEL, WEIGHTS_DIGEST, FakeGpuNode
from tests.fakes.run_script import artifact_files
from tunesmith.common.v1 import event_pb2, generation_pb2, training_spec_pb2


async def read(call: Any) -> list[Any]:
    return [response async for response in call]


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(call)
    return caught.value.code(), error_info(caught.value).reason


async def trained(client: Client, **fields: Any) -> str:
    """Id of a job that is over."""
    await client.until_node_reachable()
    dataset = await client.upload("rows")
    project = await client.create_project(dataset_id=dataset.dataset_id, **fields)
    job = await client.start_training(int(project.project_id))
    async for _ in client.events(job.job_id):
        pass
    return str(job.job_id)


async def test_a_job_s_adapter_answers_held_as_it_was_trained(client: Client, node: FakeGpuNode) -> None:
    settings = training_spec_pb2.Hyperparameters(
        quantization=training_spec_pb2.Quantization(method="nf4", double_quantization=False), chat_template="chatml"
    )
    job_id = await trained(client, hyperparameters=settings)
    # The node has let go of the run, and never had these as blobs of its own.
    node.blobs.clear()
    sampling = generation_pb2.Sampling(temperature=0.5, seed=7, stop=["END"])
    responses = await read(client.generate("hello?", job_id=job_id, sampling=sampling))
    assert [response.part.text for response in responses] == ["one ", "two ", ""]
    assert [(response.node, response.adapter) for response in responses] == [("fake", "adapter"), ("", ""), ("", "")]
    last = responses[-1].part
    assert last.finish_reason == generation_pb2.FINISH_REASON_STOP
    assert (last.statistics.num_prompt_tokens, last.statistics.num_tokens, last.statistics.warm) == (5, 2, True)
    (asked,) = node.asked
    assert (asked.base_model, asked.weights_digest, asked.model_type) == (MODEL, WEIGHTS_DIGEST, "llama")
    assert (asked.training_type, asked.quantization, asked.chat_template) == ("qlora", settings.quantization, "chatml")
    assert asked.sampling == sampling
    assert [(message.role, message.content) for message in asked.messages] == [("user", "hello?")]
    contents = artifact_files(job_id)["adapter"]
    pushed = {file.path: node.blobs[file.sha256] for file in asked.adapter_files}
    assert pushed == {path: contents[path] for path in pushed}
    assert "adapter_model.safetensors" in pushed


async def held_at_step_1(client: Client, node: FakeGpuNode, **fields: Any) -> str:
    """Id of a job that goes on."""
    node.hold_at_step = 1
    await client.until_node_reachable()
    dataset = await client.upload("rows")
    project = await client.create_project(dataset_id=dataset.dataset_id, **fields)
    job = await client.start_training(int(project.project_id))
    await client.until_event(job.job_id, is_step(1))
    return str(job.job_id)


def is_replicated(name: str) -> Callable[[Any], bool]:
    def check(event: Any) -> bool:
        told = event.payload.checkpoint
        return bool(told.name == name and told.status == event_pb2.CHECKPOINT_STATUS_REPLICATED)

    return check


async def test_a_job_that_goes_on_is_asked_by_its_newest_checkpoint(client: Client, node: FakeGpuNode) -> None:
    settings = training_spec_pb2.Hyperparameters(lora=training_spec_pb2.Lora(rank=3, alpha=5))
    job_id = await held_at_step_1(client, node, hyperparameters=settings)
    for step in (1, 2):
        files = {"weights.safetensors": b"weights %d" % step, "optimizer.safetensors": b"moments %d" % step}
        await node.checkpoint(job_id, step, files)
        await client.until_event(job_id, is_replicated(f"step-{step:08d}"))
    node.blobs.clear()
    responses = await read(client.generate(job_id=job_id))
    assert [response.adapter for response in responses] == ["step-00000002", "", ""]
    (asked,) = node.asked
    assert asked.lora == settings.lora
    assert [(file.path, node.blobs[file.sha256]) for file in asked.adapter_files] == [
        ("weights.safetensors", b"weights 2")
    ]
    assert list(node.blobs.values()) == [b"weights 2"]


async def test_a_whole_model_is_asked_as_a_base_from_the_start(client: Client, node: FakeGpuNode) -> None:
    job_id = await held_at_step_1(client, node, training_type="full")
    await node.checkpoint(job_id, 1, {"weights.safetensors": b"all of them"})
    await client.until_event(job_id, is_replicated("step-00000001"))
    assert await refused(client.generate(job_id=job_id)) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_OFFERED")
    await read(client.generate(job_id=job_id, base_only=True))
    assert not node.asked[0].adapter_files


async def test_the_base_alone_answers(client: Client, node: FakeGpuNode) -> None:
    job_id = await trained(client)
    await read(client.generate(job_id=job_id, base_only=True))
    await read(client.generate(base_model=MODEL))
    of_job, by_name = node.asked
    assert not of_job.adapter_files
    assert (of_job.training_type, of_job.weights_digest) == ("qlora", WEIGHTS_DIGEST)
    assert (by_name.base_model, by_name.training_type, by_name.weights_digest) == (MODEL, "", "")


async def test_what_is_not_there_is_refused(client: Client, node: FakeGpuNode) -> None:
    job_id = await held_at_step_1(client, node)
    assert await refused(client.generate(job_id=job_id)) == (grpc.StatusCode.NOT_FOUND, "ARTIFACT_NOT_FOUND")
    await node.release()
    assert await refused(client.generate(job_id="01NONE")) == (grpc.StatusCode.NOT_FOUND, "JOB_NOT_FOUND")
    unknown = client.generate(base_model="org/none")
    assert await refused(unknown) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_NOT_FOUND")
    assert not node.asked
    cases: list[tuple[dict[str, Any], str]] = [({}, "source"), ({"base_model": MODEL, "messages": []}, "messages")]
    for wrong, field in cases:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read(client.generate(**wrong))
        assert violated_fields(caught.value) == [field]


@pytest.mark.parametrize(
    ("refusal", "code"),
    [
        ((grpc.StatusCode.RESOURCE_EXHAUSTED, "NODE_BUSY"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        ((grpc.StatusCode.INVALID_ARGUMENT, "PROMPT_TOO_LONG"), grpc.StatusCode.INVALID_ARGUMENT),
        ((grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"), grpc.StatusCode.FAILED_PRECONDITION),
        ((grpc.StatusCode.INTERNAL, "GENERATION"), grpc.StatusCode.INTERNAL),
    ],
)
async def test_what_the_node_refuses_is_told(
    client: Client, node: FakeGpuNode, refusal: tuple[grpc.StatusCode, str], code: grpc.StatusCode
) -> None:
    await client.until_node_reachable()
    node.inference_refusal = refusal
    assert await refused(client.generate(base_model=MODEL)) == (code, refusal[1])


async def test_a_run_in_the_middle_of_an_answer_ends_it(client: Client, node: FakeGpuNode) -> None:
    await client.until_node_reachable()
    node.inference_refusal, node.refuse_after = (grpc.StatusCode.RESOURCE_EXHAUSTED, "NODE_BUSY"), 1
    call = aiter(client.generate(base_model=MODEL))
    assert (await anext(call)).part.text == "one "
    assert await refused(call) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "NODE_BUSY")
    # What was said cannot be taken back, so nobody else is asked.
    assert len(node.asked) == 1


async def test_a_cancel_gets_to_the_node(client: Client, node: FakeGpuNode) -> None:
    await client.until_node_reachable()
    node.words = ("one ", None)
    call = client.generate(base_model=MODEL)
    assert (await call.read()).part.text == "one "
    call.cancel()
    async with asyncio.timeout(60):
        await node.reader_gone.wait()


@pytest.fixture
async def second() -> AsyncIterator[FakeGpuNode]:
    node = FakeGpuNode(name="second")
    await node.start()
    try:
        yield node
    finally:
        await node.close()


async def test_a_busy_node_is_passed_over(tmp_path: Path, node: FakeGpuNode, second: FakeGpuNode) -> None:
    node.inference_refusal = (grpc.StatusCode.RESOURCE_EXHAUSTED, "NODE_BUSY")
    nodes = [NodeAddress(name=name, address=fake.address) for name, fake in (("fake", node), ("second", second))]
    async with control(tmp_path / "control", nodes=nodes) as client:
        await client.until_node_reachable("fake")
        await client.until_node_reachable("second")
        responses = await read(client.generate(base_model=MODEL))
    assert responses[0].node == "second"
    assert (len(node.asked), len(second.asked)) == (1, 1)
