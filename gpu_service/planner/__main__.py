"""The planner's process: `python -m gpu_service.planner <request.json>`. Every outcome is a line and a status.

Status 0: planned. 3: refused or failed, and the last line says why. 2: it was called wrongly.
"""

import errno
import json
import sys
import traceback
from pathlib import Path

from gpu_service.domain.errors import Fault, Refusal
from gpu_service.planner.exact import PlanRequest, make_plan
from gpu_service.planner.progress import write_line

EXIT_PLANNED, EXIT_USAGE, EXIT_REFUSED = 0, 2, 3


def main(arguments: list[str]) -> int:
    """Runs one request and returns the process' status."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m gpu_service.planner <request.json>\n")
        return EXIT_USAGE
    try:
        value = json.loads(Path(arguments[0]).read_bytes())
        try:
            request = PlanRequest.from_json(value)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            sys.stderr.write(f"{arguments[0]}: not a planner request: {type(error).__name__}: {error}\n")
            return EXIT_USAGE
        plan_directory = make_plan(request, stream=sys.stdout)
    except BrokenPipeError:
        # Whoever asked is gone; there is nobody to tell.
        return EXIT_REFUSED
    except Refusal as refusal:
        return _say_refused(refusal)
    except Exception as error:  # noqa: BLE001 - the process' outermost boundary: any defect becomes a typed failure
        traceback.print_exc()
        return _say_refused(_describe(error))
    write_line(sys.stdout, {"type": "planned", "plan_directory": str(plan_directory)})
    return EXIT_PLANNED


def _say_refused(refusal: Refusal) -> int:
    failure = refusal.to_failure()
    failure["stage"] = failure["stage"] or "PLANNING"
    write_line(sys.stdout, {"type": "refused", "failure": failure})
    return EXIT_REFUSED


def _describe(error: Exception) -> Refusal:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return Refusal(
        "DISK_FULL" if full else "PLANNING",
        Fault.PLATFORM,
        str(error) or type(error).__name__,
        stage="PLANNING",
        exception_type=f"{type(error).__module__}.{type(error).__qualname__}",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
