"""`tunesmith up`: both services in the foreground until Ctrl-C. Adds no setting of its own beyond where they live."""

import contextlib
import sys
import threading
from pathlib import Path
from typing import Annotated, TextIO

import typer

from tunesmith_cli.exit_codes import ExitCode
from tunesmith_cli.output import Format, Output
from tunesmith_cli.services import LineSink, Pair, PairConfig, ServiceFailed, stop_on_signals


def line_sink(stream: TextIO) -> LineSink:
    """Writes each line with the name of its service before it; lines are dropped once nobody reads them."""
    lock = threading.Lock()

    def sink(name: str, line: str) -> None:
        # Service logs are JSON lines already escaped by their writer. A reader that has gone (`| head`) must not stop
        # the thread that empties a service's pipe: the service would hang at its next line.
        with lock, contextlib.suppress(BrokenPipeError):
            stream.write(f"{name:<7} | {line}\n")
            stream.flush()

    return sink


def up(
    data: Annotated[Path, typer.Option("--data", help="Directory of everything both services keep.")] = Path("data"),
    models: Annotated[
        Path | None, typer.Option("--models", help="Base models; <data>/models when left out.", show_default=False)
    ] = None,
    control_address: Annotated[str, typer.Option("--control-address", help="host:port.")] = "127.0.0.1:50051",
    gpu_address: Annotated[str, typer.Option("--gpu-address", help="host:port.")] = "127.0.0.1:50052",
) -> None:
    """Runs both services in the foreground and stops both cleanly on Ctrl-C or SIGTERM."""
    out = Output(Format.TABLE)
    config = PairConfig(
        data_directory=data,
        models_directory=models or data / "models",
        control_address=control_address,
        gpu_address=gpu_address,
    )
    stopped = threading.Event()
    with stop_on_signals(stopped):
        pair = Pair(config, sink=line_sink(sys.stdout), stopped=stopped)
        try:
            with pair:
                out.remark(f"ready: control at {pair.address}, GPU service at {pair.gpu_address}; Ctrl-C stops both")
                ended = pair.wait_for_end()
                if ended is not None:
                    raise ServiceFailed(ended.ended_text())
        except KeyboardInterrupt:
            # Asked to stop while starting.
            out.remark("stopped before both were ready")
        statuses = pair.stop()
    if any(statuses):
        out.remark(f"stopped, but not cleanly: exit statuses {statuses}")
        raise typer.Exit(ExitCode.FAILED)
    out.remark("stopped")
