"""`python -m control_service` is the command `tunesmith-control`."""

from control_service.main import run

run()
