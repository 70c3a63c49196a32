"""`tunesmith chat`: asks what a job trained, and its base beside it. Talks on a terminal; one question for scripts."""

import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tunesmith_cli.conversation import Side
from tunesmith_cli.output import Output, as_json
from tunesmith_cli.session import Session, command
from tunesmith_cli.text import printable
from tunesmith_client import Answer, SamplingOptions, TunesmithError

_FORGET = "/new"


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    command(app, "chat")(chat)


def chat(
    session: Session,
    job: Annotated[str, typer.Option("--job", "-j", help="Id of the job whose adapter answers.")] = "",
    base_model: Annotated[str, typer.Option("--base-model", help="Ask this base model as it is instead.")] = "",
    compare_base: Annotated[bool, typer.Option("--compare-base", help="Ask the job's base, too.")] = False,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="One question; `-` reads it from standard input.")] = "",
    system: Annotated[str, typer.Option("--system", help="System message.")] = "",
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0, max=1, help="Draw from the most likely this much.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Draw from this many tokens; 0: from all.")] = 0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same answer.")] = 0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length of an answer.")] = 256,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End before this text appears; may be given again.")
    ] = None,
) -> None:
    """Asks what a job trained, a base model, or both side by side. Ctrl-D ends; Ctrl-C ends an answer."""
    if bool(job) == bool(base_model):
        raise typer.BadParameter("give one of --job and --base-model", param_hint="--job")
    if compare_base and not job:
        raise typer.BadParameter(
            "there is nothing to compare a base model with; give --job", param_hint="--compare-base"
        )
    sampling: SamplingOptions = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop or [],
    }

    def side(title: str, source: str) -> Side:
        return Side(
            session.client,
            title=title,
            source=source,
            job_id=job,
            base_model=base_model,
            system=system,
            sampling=sampling,
        )

    if base_model:
        sides = [side(base_model, "base")]
    else:
        sides = [side(f"adapter of job {job}", "adapter")]
        sides += [side("its base", "base")] if compare_base else []
    if prompt or session.out.is_json or not sys.stdin.isatty():
        _answer_once(session.out, sides, prompt if prompt not in ("", "-") else sys.stdin.read())
    else:
        _talk(session.out, sides)


def _answer_once(out: Output, sides: Sequence[Side], prompt: str) -> None:
    if not prompt.strip():
        raise typer.BadParameter("there is no question", param_hint="--prompt")
    if not out.is_json:
        _show(out, sides, prompt)
        return
    answers = [(side, side.ask(prompt, _say_nothing)) for side in sides]
    out.json([_answer_json(side, answer) for side, answer in answers])


def _talk(out: Output, sides: Sequence[Side]) -> None:
    out.remark(f"{_FORGET} begins anew, Ctrl-D ends, Ctrl-C ends an answer")
    while True:
        try:
            prompt = out.console.input(Text("> ", style="bold"))
        except EOFError:
            out.line("")
            return
        if prompt.strip() == _FORGET:
            for side in sides:
                side.forget()
        elif prompt.strip():
            before = [side.turns for side in sides]
            try:
                _show(out, sides, prompt)
                continue
            except KeyboardInterrupt:
                out.remark("\nstopped; that question is forgotten")
            except TunesmithError as error:
                # A busy node, for one, is free later: the conversation goes on.
                out.remark(f"error: {error}", style="red")
            # Also by the side that had answered: the two are compared on the same conversation.
            for side, turns in zip(sides, before, strict=True):
                side.return_to(turns)


def _show(out: Output, sides: Sequence[Side], prompt: str) -> None:
    if len(sides) > 1 and out.console.is_terminal:
        _show_side_by_side(out, sides, prompt)
        return
    for side in sides:
        if len(sides) > 1:
            out.line(f"# {side.title}")
        answer = side.ask(prompt, _printer(out))
        out.line("")
        out.remark(_told(answer), style="dim")


def _printer(out: Output) -> Callable[[str], None]:
    def say(text: str) -> None:
        out.console.print(Text(printable(text, keep_newlines=True)), end="", soft_wrap=True)
        out.console.file.flush()

    return say


def _show_side_by_side(out: Output, sides: Sequence[Side], prompt: str) -> None:
    """The device answers one after the other; the columns fill from left to right."""
    texts = ["" for _ in sides]
    told: list[str] = []

    def render() -> Table:
        table = Table(expand=True)
        for side in sides:
            table.add_column(Text(printable(side.title)), ratio=1, overflow="fold")
        table.add_row(*(Text(printable(text, keep_newlines=True)) for text in texts))
        return table

    # While it grows it may not fit the screen; what stays in the end is whole.
    with Live(render(), console=out.console, transient=True) as live:
        for index, side in enumerate(sides):

            def grow(text: str, index: int = index) -> None:
                texts[index] += text
                live.update(render())

            told.append(f"{side.title}: {_told(side.ask(prompt, grow))}")
    out.console.print(render())
    for line in told:
        out.remark(line, style="dim")


def _told(answer: Answer) -> str:
    """What an answer took, on one line."""
    statistics = answer.statistics
    return (
        f"{statistics.num_tokens} tokens in {statistics.seconds:.1f} s, the first after "
        f"{statistics.first_token_seconds:.1f} s{'' if statistics.warm else ' with loading'}; {answer.finish_reason}; "
        f"{statistics.num_prompt_tokens} tokens of prompt; node {answer.node}"
        f"{f'; weights of {answer.adapter}' if answer.adapter else ''}"
    )


def _answer_json(side: Side, answer: Answer) -> dict[str, object]:
    return {
        "source": side.source,
        "title": side.title,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "statistics": as_json(answer.statistics),
        "node": answer.node,
        "adapter": answer.adapter,
    }


def _say_nothing(text: str) -> None:
    """The answer is printed when it is whole."""
