"""A job as it happens: bars on a terminal, plain lines elsewhere, JSON lines for scripts. Decides nothing."""

from types import TracebackType
from typing import Protocol, Self

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from tunesmith.common.v1 import event_pb2
from tunesmith_cli.describe import describe, describe_lines, loss_of, loss_text, phase_name, stage_name, trait_losses
from tunesmith_cli.output import Output
from tunesmith_cli.text import duration, printable

# Off a terminal a long run prints about this many step lines.
_STEP_LINES = 200


class Follower(Protocol):
    """Shows events one by one. A context manager, so that a terminal is left as it was."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, event: event_pb2.Event) -> None:
        """Shows one event."""


def follower_for(out: Output) -> Follower:
    """The follower that fits the output."""
    if out.is_json:
        return JsonFollower(out)
    return BarFollower(out) if out.console.is_terminal else LineFollower(out)


class JsonFollower:
    """One line of JSON for each event."""

    def __init__(self, out: Output) -> None:
        self._out = out

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def show(self, event: event_pb2.Event) -> None:
        """Prints the event as proto JSON."""
        self._out.json_line(event)


class LineFollower:
    """One line for each event that says something; not every step of a long run."""

    def __init__(self, out: Output) -> None:
        self._out = out

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def show(self, event: event_pb2.Event) -> None:
        """Prints the event's line and flushes it."""
        if event.kind == event_pb2.EVENT_KIND_STEP and not _is_worth_a_line(event.payload.step):
            return
        if _is_loading_progress(event):
            return
        line = describe(event)
        if line:
            self._out.line(line)
            self._out.console.file.flush()


class BarFollower:
    """One line for what the run does just now and a bar for training; what is worth keeping scrolls by above them."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}", markup=False),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeElapsedColumn(),
            console=out.console,
        )
        self._activity: tuple[str, TaskID] | None = None
        self._training: TaskID | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def show(self, event: event_pb2.Event) -> None:
        """Moves the bars, or prints the event's line above them."""
        if event.kind == event_pb2.EVENT_KIND_STEP:
            self._step(event.payload.step)
        elif event.kind == event_pb2.EVENT_KIND_PHASE:
            self._start_activity(phase_name(event.payload.phase.phase))
        elif _is_loading_progress(event):
            loading = event.payload.loading
            self._start_activity(f"loading {stage_name(loading.stage)}", loading.done, loading.total, loading.unit)
        else:
            if event.kind == event_pb2.EVENT_KIND_JOB_STATE:
                self._end_activity()
            text = "\n".join(describe_lines(event))
            if text:
                # Prose is wrapped between words; any other line is left to the terminal, to be copied whole.
                is_prose = event.kind == event_pb2.EVENT_KIND_SAMPLE
                self._bars.console.print(Text(text), soft_wrap=not is_prose)

    def _step(self, step: event_pb2.StepEvent) -> None:
        self._end_activity()
        if self._training is None:
            self._training = self._bars.add_task("training", total=step.total_steps, count="", numbers="")
        traits = printable(trait_losses(step.trait_losses))
        numbers = (
            f"loss {loss_text(loss_of(step))} ({traits}) lr {step.learning_rate:.1e} "
            f"{step.tokens_per_second:.0f} tok/s eta {duration(step.remaining_seconds)}"
        )
        count = f"{step.step}/{step.total_steps}"
        self._bars.update(self._training, completed=step.step, total=step.total_steps, count=count, numbers=numbers)

    def _start_activity(self, description: str, done: int = 0, total: int = 0, unit: str = "") -> None:
        if self._activity is None or self._activity[0] != description:
            # A task of its own: its time starts at zero, and no total is left over from the one before.
            self._end_activity()
            # Without a total the bar only moves to and fro.
            self._activity = description, self._bars.add_task(description, total=None, count="", numbers="")
        if total:
            count = f"{done}/{total}"
            self._bars.update(self._activity[1], completed=done, total=total, count=count, numbers=printable(unit))

    def _end_activity(self) -> None:
        if self._activity is not None:
            self._bars.remove_task(self._activity[1])
            self._activity = None


def _is_loading_progress(event: event_pb2.Event) -> bool:
    moving = (event_pb2.STAGE_STATUS_STARTED, event_pb2.STAGE_STATUS_PROGRESS)
    return event.kind == event_pb2.EVENT_KIND_LOADING and event.payload.loading.status in moving


def _is_worth_a_line(step: event_pb2.StepEvent) -> bool:
    every = max(1, step.total_steps // _STEP_LINES)
    return step.step in (1, step.total_steps) or step.step % every == 0
