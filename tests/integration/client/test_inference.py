"""Asking jobs and bases: client nouns and `tunesmith chat` against a service that says what the test says."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import sys
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from tests.fakes.scripted_control import FakeControl, refuse
from tunesmith.common.v1 import generation_pb2
from tunesmith.control.v1 import inference_service_pb2
from tunesmith_cli.main import main
from tunesmith_client import AsyncClient, CallCancelled, Client, ResourceExhausted

JOB = "01JZZZZZZZZZZZZZZZZZZZZZZZ"
Part = generation_pb2.GeneratedPart
Response = inference_service_pb2.GenerateResponse


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeControl]:
    with FakeControl() as fake:
        monkeypatch.setenv("TUNESMITH_ADDRESS", fake.address)
        fake.handlers["Generate"] = answer
        yield fake


def answer(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
    """Says who was asked, and the last message back."""
    who = "base" if request.base_only else request.base_model or "adapter"
    yield Response(
        part=Part(text=f"{who}: ", num_tokens=1), node="local", adapter="" if who == "base" else "step-00000004"
    )
    yield Response(part=Part(text=request.messages[-1].content, num_tokens=1))
    statistics = generation_pb2.GenerationStatistics(num_prompt_tokens=4, num_tokens=2, seconds=0.5, warm=True)
    yield Response(part=Part(finish_reason=generation_pb2.FINISH_REASON_STOP, statistics=statistics))


def test_parts_come_one_after_the_other_and_an_answer_is_their_sum(control: FakeControl) -> None:
    with Client() as client:
        parts = list(client.inference.generate("hi", job_id=JOB, temperature=0.5, stop=["END"]))
        said: list[str] = []
        whole = client.inference.answer("hi", base_model="org/name", on_text=said.append)
    assert [part.text for part in parts] == ["adapter: ", "hi", ""]
    assert (whole.text, whole.finish_reason, whole.node) == ("org/name: hi", "STOP", "local")
    assert (whole.statistics.num_tokens, "".join(said)) == (2, whole.text)
    first, second = control.calls("Generate")
    assert (first.job_id, first.WhichOneof("source"), second.WhichOneof("source")) == (JOB, "job_id", "base_model")
    assert (first.sampling.temperature, list(first.sampling.stop)) == (0.5, ["END"])
    # What was not said is left to the service.
    assert not first.sampling.HasField("max_new_tokens")
    assert [(message.role, message.content) for message in first.messages] == [("user", "hi")]


async def test_asyncio_has_the_same(control: FakeControl) -> None:
    async with AsyncClient() as client:
        parts = [part async for part in client.inference.generate("hi", job_id=JOB, base_only=True)]
        whole = await client.inference.answer("hi", job_id=JOB)
    assert "".join(part.text for part in parts) == "base: hi"
    assert (whole.text, whole.finish_reason) == ("adapter: hi", "STOP")


async def test_closing_the_client_ends_an_answer_with_a_typed_error(control: FakeControl) -> None:
    over = threading.Event()

    def endless(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        context.add_callback(over.set)
        yield from itertools.islice(answer(request, context), 1)
        over.wait(30)

    control.handlers["Generate"] = endless
    client, asking = Client(control.address), AsyncClient(control.address)
    parts = asking.inference.generate("Hello?", job_id=JOB)
    assert (await anext(parts)).text
    reading = asyncio.ensure_future(anext(parts))
    await asyncio.sleep(0)
    await asking.close()
    with pytest.raises(CallCancelled, match="the client is closed"):
        await asyncio.wait_for(reading, 30)
    assert await asyncio.to_thread(over.wait, 10)
    client.close()
    for late in (lambda: list(client.inference.generate("Hello?", job_id=JOB)), lambda: client.nodes.list()):
        with pytest.raises(CallCancelled, match="the client is closed"):
            late()
    with pytest.raises(CallCancelled, match="the client is closed"):
        await asking.inference.answer("Hello?", job_id=JOB)


def test_leaving_the_loop_ends_the_generation(control: FakeControl) -> None:
    gone = threading.Event()

    def endless(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        context.add_callback(gone.set)
        while not gone.wait(0.01):
            yield Response(part=Part(text="x", num_tokens=1))

    control.handlers["Generate"] = endless
    with Client() as client:
        parts = client.inference.generate("hi", job_id=JOB)
        next(parts)
        parts.close()
        assert gone.wait(60)


def test_a_refusal_is_typed_and_one_source_is_needed(control: FakeControl) -> None:
    def busy(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield Response(part=Part(text="half", num_tokens=1))
        refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "NODE_BUSY", retry_after_seconds=5)

    control.handlers["Generate"] = busy
    with Client() as client:
        parts = client.inference.generate("hi", job_id=JOB)
        assert next(parts).text == "half"
        with pytest.raises(ResourceExhausted) as caught:
            next(parts)
        assert (caught.value.reason, caught.value.retry_after_seconds) == ("NODE_BUSY", 5)
        for wrong in ({}, {"job_id": JOB, "base_model": "org/name"}):
            with pytest.raises(ValueError, match="one of the two"):
                client.inference.generate("hi", **wrong)  # type: ignore[arg-type]


def test_chat_answers_one_question(control: FakeControl, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--system", "be brief", "--temperature", "0.7", "--seed", "3", "--max-new-tokens", "9", "--stop", "END"]
    assert main(["chat", "--job", JOB, "--prompt", "what?", *options]) == 0
    captured = capsys.readouterr()
    assert captured.out == "adapter: what?\n"
    assert "2 tokens in 0.5 s" in captured.err
    assert "node local; weights of step-00000004" in captured.err
    (request,) = control.calls("Generate")
    assert [(message.role, message.content) for message in request.messages] == [
        ("system", "be brief"),
        ("user", "what?"),
    ]
    sampling = request.sampling
    assert (sampling.temperature, sampling.seed, sampling.max_new_tokens) == (0.7, 3, 9)


def test_chat_compares_one_after_the_other_off_a_terminal(
    control: FakeControl, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", "--job", JOB, "--compare-base", "--prompt", "what?"]) == 0
    assert capsys.readouterr().out == f"# adapter of job {JOB}\nadapter: what?\n# its base\nbase: what?\n"
    assert main(["chat", "--job", JOB, "--compare-base", "--prompt", "what?", "--output", "json"]) == 0
    adapter, base = json.loads(capsys.readouterr().out)
    assert (adapter["source"], adapter["text"], adapter["finish_reason"]) == ("adapter", "adapter: what?", "STOP")
    assert (base["source"], base["text"], base["node"]) == ("base", "base: what?", "local")
    assert (adapter["adapter"], base["adapter"]) == ("step-00000004", "")
    assert base["statistics"]["num_tokens"] == 2


def test_chat_reads_a_question_from_a_pipe(
    control: FakeControl, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert main(["chat", "--base-model", "org/name"]) == 0
    assert capsys.readouterr().out == "org/name: from a pipe\n"


def test_chat_talks_on_a_terminal_and_shows_both_side_by_side(
    control: FakeControl, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("first\nsecond\n/new\nthird\n"))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["chat", "--job", JOB, "--compare-base"]) == 0
    out = capsys.readouterr().out
    assert any("adapter: second" in line and "base: second" in line for line in out.splitlines())
    turns = [[message.content for message in request.messages] for request in control.calls("Generate")]
    assert turns[2:] == [
        ["first", "adapter: first", "second"],
        ["first", "base: first", "second"],
        ["third"],
        ["third"],
    ]


def test_a_question_that_one_side_did_not_answer_is_forgotten_by_both(
    control: FakeControl, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def busy_at_first(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        if request.base_only and request.messages[-1].content == "first":
            refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "NODE_BUSY", retry_after_seconds=5)
        yield from answer(request, context)

    control.handlers["Generate"] = busy_at_first
    monkeypatch.setattr(sys, "stdin", Terminal("first\nsecond\n"))
    assert main(["chat", "--job", JOB, "--compare-base"]) == 0
    assert "NODE_BUSY" in capsys.readouterr().err
    turns = [[message.content for message in request.messages] for request in control.calls("Generate")]
    assert turns == [["first"], ["first"], ["second"], ["second"]]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prompt", "x"],
        ["--job", JOB, "--base-model", "org/name", "--prompt", "x"],
        ["--base-model", "org/name", "--compare-base", "--prompt", "x"],
        ["--job", JOB, "--prompt", " "],
    ],
)
def test_chat_used_wrongly_asks_nobody(control: FakeControl, arguments: list[str]) -> None:
    assert main(["chat", *arguments]) == 2
    assert not control.calls("Generate")


def test_what_a_model_says_cannot_drive_a_terminal(control: FakeControl, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--job", JOB, "--prompt", "a\x1b[31m\nb"]) == 0
    assert capsys.readouterr().out == "adapter: a\\x1b[31m\nb\n"
