"""Consumers of jobs' events: each follows one job through the product's own watch and writes down what it was given.

The bytes of each payload are hashed as they came off the wire, before anything read them.
"""

from __future__ import annotations

import hashlib
import threading
from typing import Any

import grpc

from tests.faults.driver.evidence import Evidence
from tunesmith.control.v1 import job_service_pb2
from tunesmith.gpu.v1 import run_service_pb2
from tunesmith_client import ClientConfig, RetryPolicy
from tunesmith_client._cursor import Cursor
from tunesmith_client._watch import Watch

_RETRY = RetryPolicy(initial_backoff_seconds=0.05, max_backoff_seconds=0.5)


class Consumer:
    """A thread that follows a job to its end."""

    def __init__(self, name: str, job_id: str, *, address: str, evidence: Evidence) -> None:
        self.name = name
        self.job_id = job_id
        # What ended it before the job did.
        self.error: Exception | None = None
        self._evidence = evidence
        self._hashes: dict[int, str] = {}
        config = ClientConfig(address=address, retry=_RETRY, watch_give_up_seconds=180.0)
        self._channel = grpc.insecure_channel(address, options=config.channel_options())
        stream = self._channel.unary_stream(
            "/tunesmith.control.v1.JobService/WatchJob",
            request_serializer=job_service_pb2.WatchJobRequest.SerializeToString,
            response_deserializer=self._take,
        )
        cursor = Cursor(job_id=job_id, after_sequence=0, config=config)
        self._watch = Watch(lambda request: stream(request), cursor, config.silence_limit_seconds)
        (evidence.directory / "watches" / f"{name}.jsonl").touch()
        self._thread = threading.Thread(target=self._follow, name=name, daemon=True)
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Until the job's last event was given. AssertionError when that takes too long or the watch broke."""
        self._thread.join(seconds)
        position = self._watch.position
        assert not self._thread.is_alive(), f"{self.name} still waits behind event {position} of job {self.job_id}"
        assert self.error is None, f"{self.name} broke behind event {position}: {self.error!r}"

    def close(self) -> None:
        """Ends it, wherever it is."""
        self._watch.close()
        self._thread.join(10.0)
        self._channel.close()

    def _take(self, raw: bytes) -> Any:
        # Of the same form on the wire, but with payloads left as they are.
        for event in run_service_pb2.WatchRunResponse.FromString(raw).events:
            self._hashes[event.sequence] = hashlib.sha256(event.payload).hexdigest()
        return job_service_pb2.WatchJobResponse.FromString(raw)

    def _follow(self) -> None:
        try:
            for event in self._watch:
                line = {
                    "job_id": self.job_id,
                    "sequence": event.sequence,
                    "attempt": event.attempt,
                    "run_sequence": event.run_sequence,
                    "payload_sha256": self._hashes[event.sequence],
                }
                self._evidence.append(f"watches/{self.name}", line)
        except Exception as error:  # noqa: BLE001 - a thread's boundary: raised where it is joined
            self.error = error
