"""The append-only event file of one run.

Written by the run's engine, and by its shim once the engine is dead; read by the server. Leans on the standard library
and the event contract only, so that the shim stays small. Refuses to be written by two processes at once.
"""

from gpu_service.journal.file import (
    DURABLE_KINDS,
    STEPS_LOST,
    JournalDamaged,
    JournalFull,
    JournalLocked,
    Reader,
    Record,
    Writer,
)
from gpu_service.journal.summary import TERMINAL_RUN_STATES, RunSummary, summarize

__all__ = [
    "DURABLE_KINDS",
    "STEPS_LOST",
    "TERMINAL_RUN_STATES",
    "JournalDamaged",
    "JournalFull",
    "JournalLocked",
    "Reader",
    "Record",
    "RunSummary",
    "Writer",
    "summarize",
]
