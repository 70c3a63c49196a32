"""Fencing, the memory ledger and the run's states of a node under every order of starts, stops and ends: no device
has two runs, no attempt below the highest is taken, and an end is an end."""

from __future__ import annotations

import contextlib

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpu_service.domain import fencing
from gpu_service.domain.errors import Refusal
from gpu_service.domain.memory import MemoryLedger
from gpu_service.domain.run_state import TERMINAL_STATES, TRANSITIONS, RunState, shown_state

_CAPACITY_BYTES = 100
_JOBS = ("one", "two")


class NodeMachine(RuleBasedStateMachine):
    """A node that keeps what `runs.manager` keeps, and nothing else."""

    @initialize(num_devices=st.integers(1, 2))
    def begin(self, num_devices: int) -> None:
        self.devices = [f"cuda:{index}" for index in range(num_devices)]
        self.ledger = MemoryLedger()
        self.highest: dict[str, int] = {}
        self.digests: dict[tuple[str, int], str] = {}
        self.states: dict[tuple[str, int], RunState] = {}
        self.ended: dict[tuple[str, int], RunState] = {}

    @rule(
        job=st.sampled_from(_JOBS),
        attempt=st.integers(1, 5),
        digest=st.sampled_from(["d", "d", "d", "other"]),
        num_bytes=st.sampled_from([10, 100, 101]),
        fails_after=st.booleans(),
    )
    def start(self, job: str, attempt: int, digest: str, num_bytes: int, fails_after: bool) -> None:
        key, before = (job, attempt), dict(self.states)
        highest = self.highest.get(job, 0)
        admission: fencing.Admission | None
        try:
            admission = fencing.admit(
                attempt=attempt, spec_digest=digest, highest_attempt=highest, known_digest=self.digests.get(key)
            )
        except Refusal as refusal:
            reason, details = refusal.reason, refusal.details
            admission = None
        if admission is None:
            assert reason in ("STALE_EPOCH", "RUN_CONFLICT")
            assert attempt <= highest
            # Control learns from it where to go on.
            assert reason == "RUN_CONFLICT" or details["highest_attempt"] == str(highest)
            return
        if admission is fencing.Admission.SAME_RUN:
            assert self.digests[key] == digest
            assert self.states == before
            return
        assert attempt > highest
        older = [f"{j}/{a}" for (j, a), state in self.states.items() if j == job and state not in TERMINAL_STATES]
        self._place(key, digest, num_bytes, older, fails_after)

    def _place(self, key: tuple[str, int], digest: str, num_bytes: int, older: list[str], fails_after: bool) -> None:
        name = f"{key[0]}/{key[1]}"
        free = [device for device in self.devices if self.ledger.holder_of(device) is None]
        leaving = [device for device in self.devices if self.ledger.holder_of(device) in older]
        if not free and not leaving:
            return
        device = (free or leaving)[0]
        holder = self.ledger.holder_of(device)
        displaced = self.ledger.release(holder) if holder else None
        held = self._held()
        with contextlib.suppress(Refusal):
            self.ledger.reserve(run_id=name, device_id=device, num_bytes=num_bytes, capacity_bytes=_CAPACITY_BYTES)
        assert self.ledger.holds(name) is (num_bytes <= _CAPACITY_BYTES)
        if not self.ledger.holds(name) or fails_after:
            # Whatever kept it from the disk: as it was before.
            self.ledger.release(name)
            assert self._held() == held
            if displaced is not None:
                self.ledger.restore(displaced)
                assert self.ledger.holder_of(device) == holder
            return
        self.highest[key[0]] = key[1]
        self.digests[key], self.states[key] = digest, RunState.ACCEPTED

    @precondition(lambda self: any(state not in TERMINAL_STATES for state in self.states.values()))
    @rule(data=st.data(), stop_requested=st.booleans())
    def go_on(self, data: st.DataObject, stop_requested: bool) -> None:
        key = data.draw(st.sampled_from(sorted(k for k, state in self.states.items() if state not in TERMINAL_STATES)))
        following = data.draw(st.sampled_from(sorted(TRANSITIONS[self.states[key]])))
        self.states[key] = following
        shown = shown_state(following, stop_requested=stop_requested)
        assert shown is following or (stop_requested and shown is RunState.STOPPING)
        assert (shown in TERMINAL_STATES) is (following in TERMINAL_STATES)
        if following in TERMINAL_STATES:
            self.ended[key] = following
            self.ledger.release(f"{key[0]}/{key[1]}")

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.ended)))
        del self.ended[key], self.states[key], self.digests[key]

    @invariant()
    def an_end_is_an_end(self) -> None:
        for key, state in getattr(self, "ended", {}).items():
            assert self.states[key] is state
            assert not TRANSITIONS[state]
            assert not self.ledger.holds(f"{key[0]}/{key[1]}")

    @invariant()
    def one_run_for_each_device(self) -> None:
        if hasattr(self, "ledger"):
            held = self._held()
            assert len(held) == len(set(held)) <= len(self.devices)

    def _held(self) -> list[str]:
        return [holder for device in self.devices if (holder := self.ledger.holder_of(device)) is not None]


TestNodeMachine = NodeMachine.TestCase
TestNodeMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
