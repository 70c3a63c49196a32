"""`python -m gpu_service` is the command `tunesmith-gpu`."""

from gpu_service.main import run

run()
