"""Exit statuses and the demo's verdict, as pure functions."""

import io

import pytest

import tunesmith_client
from tunesmith.common.v1 import event_pb2
from tunesmith_cli.demo.result import AFTER, BEFORE, DemoResult, report
from tunesmith_cli.exit_codes import ExitCode, exit_code_of
from tunesmith_cli.output import Format, Output
from tunesmith_cli.up import line_sink
from tunesmith_client import JobFailed, TunesmithError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (tunesmith_client.InvalidArgument("x"), 3),
        (tunesmith_client.OutOfRange("x"), 3),
        (tunesmith_client.NotFound("x"), 3),
        (tunesmith_client.FailedPrecondition("x"), 3),
        (tunesmith_client.AlreadyExists("x"), 3),
        (tunesmith_client.ResourceExhausted("x"), 3),
        (tunesmith_client.Unavailable("x"), 4),
        (tunesmith_client.DeadlineExceeded("x"), 4),
        (tunesmith_client.ServiceDefect("x"), 1),
        (tunesmith_client.TransferDamaged("x"), 1),
        (JobFailed("x", reason="ENGINE_KILLED", job_id="j", state="FAILED"), 1),
        (TunesmithError("x"), 1),
    ],
)
def test_every_error_has_its_exit_status(error: TunesmithError, code: int) -> None:
    assert exit_code_of(error) == code


def test_the_numbers_are_those_that_the_documents_give() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "OK": 0,
        "FAILED": 1,
        "USAGE": 2,
        "REFUSED": 3,
        "UNREACHABLE": 4,
        "INTERRUPTED": 130,
    }


def evaluation(moment: int, **losses: float | None) -> event_pb2.Event:
    event = event_pb2.Event(kind=event_pb2.EVENT_KIND_EVALUATION)
    event.payload.evaluation.moment = moment  # type: ignore[assignment]
    for trait, loss in losses.items():
        event.payload.evaluation.losses.add(trait_type=trait, loss=loss)
        # A dataset's own loss is not the trait's.
        event.payload.evaluation.losses.add(trait_type=trait, dataset_id=5, loss=99.0)
    return event


def verdict(*events: event_pb2.Event) -> bool:
    result = DemoResult(job_id="j")
    for event in events:
        result.add(event)
    return result.all_fell()


def test_the_demo_succeeds_only_when_every_trait_fell() -> None:
    before = evaluation(BEFORE, units=3.0, structure=2.0)
    assert verdict(before, evaluation(AFTER, units=1.0, structure=1.0))
    assert not verdict(before, evaluation(AFTER, units=1.0, structure=2.0))
    assert not verdict(before, evaluation(AFTER, units=1.0, structure=None))
    assert not verdict(before, evaluation(AFTER, units=1.0))
    assert not verdict(before)
    assert not verdict()


def test_a_later_attempt_replaces_an_earlier_ones_word() -> None:
    before = evaluation(BEFORE, units=3.0)
    assert not verdict(before, evaluation(AFTER, units=1.0), evaluation(AFTER, units=4.0))


def test_the_report_shows_prompts_and_answers_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    result = DemoResult(job_id="j")
    for moment, answer in ((BEFORE, "\x1b[2Jno"), (AFTER, "Given: 7\nResult: 70")):
        event = event_pb2.Event(kind=event_pb2.EVENT_KIND_SAMPLE)
        event.payload.sample.prompt, event.payload.sample.answer = "Question: what?\nAnswer:", answer
        event.payload.sample.moment = moment
        result.add(event)
    report(Output(Format.TABLE), result, [])
    out = capsys.readouterr().out
    assert (
        "prompt:\n    Question: what?\n    Answer:\nbefore:\n    \\x1b[2Jno\nafter:\n    Given: 7\n    Result: 70\n"
        in out
    )


def test_lines_of_services_are_dropped_when_nobody_reads_them_any_more() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    stream = io.StringIO()
    line_sink(stream)("gpu", "{}")
    assert stream.getvalue() == "gpu     | {}\n"
    line_sink(Closed())("gpu", "{}")
