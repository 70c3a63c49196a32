"""All mutations. A test holds each to the code: its snippet stands once in its file, and its tests are there."""

from __future__ import annotations

from tests.faults.mutations.blobs import BYTES
from tests.faults.mutations.client import CLIENT
from tests.faults.mutations.engine import ENGINE
from tests.faults.mutations.files import FILES
from tests.faults.mutations.jobs import JOBS
from tests.faults.mutations.mutation import Mutation
from tests.faults.mutations.runs import RUNS
from tests.faults.mutations.service import SERVICE
from tests.faults.mutations.store import LOG, STORE

MUTATIONS: tuple[Mutation, ...] = (
    *CLIENT,
    *STORE,
    *LOG,
    *JOBS,
    *BYTES,
    *SERVICE,
    *FILES,
    *RUNS,
    *ENGINE,
)
