"""How a job is shown: bars on a terminal, lines elsewhere, and never every step of a long run."""

import io

from rich.console import Console

from tunesmith.common.v1 import event_pb2
from tunesmith_cli.follow import BarFollower, JsonFollower, LineFollower, follower_for
from tunesmith_cli.output import Format, Output


def output(*, is_terminal: bool, format: Format = Format.TABLE) -> Output:
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=160, no_color=True, highlight=False)
    return Output(format, console=console)


def written(out: Output) -> str:
    assert isinstance(out.console.file, io.StringIO)
    return out.console.file.getvalue()


def step(number: int, total: int) -> event_pb2.Event:
    event = event_pb2.Event(sequence=number, kind=event_pb2.EVENT_KIND_STEP)
    event.payload.step.MergeFrom(event_pb2.StepEvent(step=number, total_steps=total, loss=1.5, learning_rate=2e-4))
    event.payload.step.trait_losses.add(trait_type="units", loss=1.25)
    return event


def phase(number: "event_pb2.Phase.ValueType") -> event_pb2.Event:
    event = event_pb2.Event(kind=event_pb2.EVENT_KIND_PHASE)
    event.payload.phase.phase = number
    return event


def loading(status: "event_pb2.StageStatus.ValueType") -> event_pb2.Event:
    event = event_pb2.Event(kind=event_pb2.EVENT_KIND_LOADING)
    event.payload.loading.MergeFrom(
        event_pb2.LoadingEvent(
            stage=event_pb2.LOADING_STAGE_WEIGHTS, status=status, unit="tensors", done=3, total=9, seconds=1.0
        )
    )
    return event


def test_the_follower_fits_the_output() -> None:
    assert isinstance(follower_for(output(is_terminal=True)), BarFollower)
    assert isinstance(follower_for(output(is_terminal=False)), LineFollower)
    assert isinstance(follower_for(output(is_terminal=True, format=Format.JSON)), JsonFollower)


def test_a_step_line_has_what_people_look_for() -> None:
    out = output(is_terminal=False)
    with LineFollower(out) as follower:
        follower.show(step(1, 5))
    for part in ("1/5", "loss 1.5000", "units 1.2500", "lr 2.00e-04", "tok/s", "eta"):
        assert part in written(out)
    assert "\x1b" not in written(out)


def test_a_long_run_does_not_print_every_step() -> None:
    out = output(is_terminal=False)
    with LineFollower(out) as follower:
        for number in range(1, 10_001):
            follower.show(step(number, 10_000))
    lines = written(out).splitlines()
    assert 190 <= len(lines) <= 210
    assert "10000/10000" in lines[-1]


def test_off_a_terminal_a_loading_stage_is_one_line() -> None:
    out = output(is_terminal=False)
    with LineFollower(out) as follower:
        follower.show(loading(event_pb2.STAGE_STATUS_STARTED))
        for _ in range(5):
            follower.show(loading(event_pb2.STAGE_STATUS_PROGRESS))
        follower.show(loading(event_pb2.STAGE_STATUS_FINISHED))
    assert len(written(out).splitlines()) == 1


def test_a_terminal_shows_what_goes_on_and_keeps_what_is_worth_keeping() -> None:
    out = output(is_terminal=True)
    with BarFollower(out) as follower:
        follower.show(phase(event_pb2.PHASE_EVALUATING))
        follower._bars.refresh()
        follower.show(loading(event_pb2.STAGE_STATUS_PROGRESS))
        follower._bars.refresh()
        follower.show(loading(event_pb2.STAGE_STATUS_FINISHED))
        follower.show(step(2, 5))
    text = written(out)
    for part in ("evaluating", "loading weights", "3/9", "tensors", "done in 1.0 s", "training", "2/5", "units 1.2500"):
        assert part in text


def test_an_activity_shows_no_number_that_belongs_to_the_one_before() -> None:
    out = output(is_terminal=True)
    with BarFollower(out) as follower:
        follower.show(loading(event_pb2.STAGE_STATUS_PROGRESS))
        follower.show(phase(event_pb2.PHASE_EVALUATING))
        (task,) = follower._bars.tasks
        assert (task.description, task.total, task.completed) == ("evaluating", None, 0)
        assert (task.fields["count"], task.fields["numbers"]) == ("", "")


def test_an_answer_of_many_lines_keeps_them_on_a_terminal_and_is_one_line_elsewhere() -> None:
    event = event_pb2.Event(kind=event_pb2.EVENT_KIND_SAMPLE)
    event.payload.sample.MergeFrom(
        event_pb2.SampleEvent(prompt="one\ntwo", answer="three\nfour\x1b[2J", moment=event_pb2.EVALUATION_MOMENT_BASE)
    )
    bars, lines = output(is_terminal=True), output(is_terminal=False)
    with BarFollower(bars) as bar_follower, LineFollower(lines) as line_follower:
        bar_follower.show(event)
        line_follower.show(event)
    assert "answer (base) to:\n    one\n    two\n  is:\n    three\n    four\\x1b[2J\n" in written(bars)
    assert len(written(lines).splitlines()) == 1
