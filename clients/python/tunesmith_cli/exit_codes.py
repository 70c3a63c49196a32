"""What the command's exit status means, in one table; scripts may rely on it."""

from enum import IntEnum

from tunesmith_client import (
    DeadlineExceeded,
    JobFailed,
    Refused,
    ResourceExhausted,
    ServiceDefect,
    TransferDamaged,
    TunesmithError,
    Unavailable,
)


class ExitCode(IntEnum):
    """Exit statuses."""

    OK = 0
    # A job failed or was cancelled, the demo's loss did not fall, a service defect, a damaged transfer.
    FAILED = 1
    # The command line, or a file named on it, is wrong; nothing was sent.
    USAGE = 2
    # The service refused: invalid, not found, not in this state, too much.
    REFUSED = 3
    # The service cannot be reached or did not answer in time.
    UNREACHABLE = 4
    # Ctrl-C.
    INTERRUPTED = 130


_BY_ERROR: tuple[tuple[type[TunesmithError], ExitCode], ...] = (
    (Unavailable, ExitCode.UNREACHABLE),
    (DeadlineExceeded, ExitCode.UNREACHABLE),
    (JobFailed, ExitCode.FAILED),
    (TransferDamaged, ExitCode.FAILED),
    (ServiceDefect, ExitCode.FAILED),
    (Refused, ExitCode.REFUSED),
    (ResourceExhausted, ExitCode.REFUSED),
)


def exit_code_of(error: TunesmithError) -> ExitCode:
    """The exit status for an error of the client."""
    for kind, code in _BY_ERROR:
        if isinstance(error, kind):
            return code
    return ExitCode.FAILED
