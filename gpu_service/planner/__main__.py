"""The planner's process: `python -m gpu_service.planner <request.json>`. Every outcome is a line and a status.

It plans a spec, or inspects a dataset when the request has `inspect`. Status 0: done. 3: refused or failed, and the
last line says why. 2: it was called wrongly. With `--wait` in place of a request it has imported everything before it
is wanted: one line of its standard input, `{"request": "/abs", "log": "/abs"}`, is its request and what takes the place
of its standard error; an input that ends without one ends it, with status 0.
"""

import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpu_service.doctor import read_versions
from gpu_service.domain.errors import Fault, Refusal
from gpu_service.planner.exact import PlanRequest, make_plan
from gpu_service.planner.inspection import InspectRequest, inspect_dataset
from gpu_service.planner.progress import write_line

EXIT_DONE, EXIT_USAGE, EXIT_REFUSED = 0, 2, 3
WAIT = "--wait"


def main(arguments: list[str]) -> int:
    """Runs one request and returns the process' status."""
    if len(arguments) != 1:
        sys.stderr.write(f"usage: python -m gpu_service.planner <request.json> | {WAIT}\n")
        return EXIT_USAGE
    versions: Mapping[str, str] | None = None
    if arguments[0] == WAIT:
        versions = read_versions()
        line = sys.stdin.readline()
        if not line:
            return EXIT_DONE
        order = json.loads(line)
        os.dup2(os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), sys.stderr.fileno())
        arguments = [order["request"]]
    try:
        value = json.loads(Path(arguments[0]).read_bytes())
        try:
            carry_out = _prepare(value, versions)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            sys.stderr.write(f"{arguments[0]}: not a planner request: {type(error).__name__}: {error}\n")
            return EXIT_USAGE
        answer = carry_out()
    except BrokenPipeError:
        # Whoever asked is gone; there is nobody to tell.
        return EXIT_REFUSED
    except Refusal as refusal:
        return _say_refused(refusal)
    except Exception as error:  # noqa: BLE001 - the process' outermost boundary: any defect becomes a typed failure
        _print_trace()
        return _say_refused(_describe(error))
    write_line(sys.stdout, answer)
    return EXIT_DONE


def _prepare(value: Mapping[str, Any], versions: Mapping[str, str] | None) -> Callable[[], dict[str, Any]]:
    """What the request asks for; called, it gives the answer."""
    if "inspect" in value:
        inspection = InspectRequest.from_json(value)
        return lambda: {"type": "inspected", **inspect_dataset(inspection, stream=sys.stdout)}
    request = PlanRequest.from_json(value)
    return lambda: {"type": "planned", "plan_directory": str(make_plan(request, stream=sys.stdout, versions=versions))}


def _say_refused(refusal: Refusal) -> int:
    failure = refusal.to_failure()
    failure["stage"] = failure["stage"] or "PLANNING"
    write_line(sys.stdout, {"type": "refused", "failure": failure})
    return EXIT_REFUSED


def _print_trace() -> None:
    """The answer matters more than the log: where the log has no room, the trace is dropped, and so is what of it still
    waits to be written, which would change the exit status."""
    try:
        traceback.print_exc()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _reason_of(error: Exception) -> tuple[str, Fault]:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "DISK_FULL", Fault.PLATFORM
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "HOST_OUT_OF_MEMORY", Fault.HARDWARE
    return "PLANNING", Fault.PLATFORM


def _describe(error: Exception) -> Refusal:
    reason, fault = _reason_of(error)
    return Refusal(
        reason,
        fault,
        str(error) or type(error).__name__,
        stage="PLANNING",
        exception_type=f"{type(error).__module__}.{type(error).__qualname__}",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
