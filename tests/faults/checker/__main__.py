"""`python -m tests.faults.checker <evidence directory>`: one line a promise; status 1 when one did not hold."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.faults.checker import check


def main(arguments: list[str]) -> int:
    """Prints what was found; 2 when called wrongly."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m tests.faults.checker <evidence directory>\n")
        return 2
    findings = check(Path(arguments[0]))
    for finding in findings:
        sys.stdout.write(f"{finding.promise:4} tried {finding.tried:6}  held {finding.held:6}\n")
        sys.stdout.writelines(f"       {violation}\n" for violation in finding.violations)
    return 1 if any(finding.held < finding.tried for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
