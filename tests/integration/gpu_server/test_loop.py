"""Nothing that the server does for a call blocks its event loop."""

from __future__ import annotations

import threading
from pathlib import Path

from tests.fakes.gpu_runs import WAIT_SECONDS
from tests.fakes.gpu_server import INSTALLATION, GpuServer
from tunesmith.common.v1 import event_pb2, plan_pb2
from tunesmith.gpu.v1 import run_service_pb2


def test_no_call_opens_lists_or_sleeps_on_the_event_loop(tmp_path: Path) -> None:
    report = tmp_path / "report"
    server = GpuServer(tmp_path, cache_max_bytes=0)
    server.module = ("tests.fakes.watched_gpu_server", str(report))
    try:
        server.start()
        use_everything(server, tmp_path)
        # Adoption too.
        server.kill()
        server.start()
        server.stop_run("CANCEL", job_id="01HELD")
        assert server.watch_to_end("01HELD")[-1].run_state.state == event_pb2.RUN_STATE_CANCELLED
        assert server.terminate() == 0
    finally:
        server.clean_up()
    assert report.read_text() == ""


def use_everything(server: GpuServer, root: Path) -> None:
    server.runs.GetCapabilities(run_service_pb2.GetCapabilitiesRequest(), timeout=WAIT_SECONDS)
    for level in (plan_pb2.PLAN_LEVEL_CHECK, plan_pb2.PLAN_LEVEL_EXACT):
        asked = run_service_pb2.PlanRunRequest(spec=server.request().spec, level=level)
        server.runs.PlanRun(asked, timeout=WAIT_SECONDS)
    server.write_blob(b"x" * 5000)
    node = server.runs.WatchNode(
        run_service_pb2.WatchNodeRequest(installation_id=INSTALLATION, heartbeat_seconds=0.1), timeout=WAIT_SECONDS
    )
    watching = threading.Thread(target=lambda: [None for _ in zip(range(20), node, strict=False)])
    watching.start()
    server.start_run(num_steps=4, save_every_steps=2)
    events = server.watch_to_end()
    checkpoint = next(payload.checkpoint for payload in events if payload.HasField("checkpoint"))
    assert server.read_blob(checkpoint.manifest_sha256)
    resume = run_service_pb2.ResumeFrom(checkpoint=checkpoint.name, step=checkpoint.step, attempt=1)
    server.start_run(attempt=2, resume_from=resume)
    server.watch_to_end(attempt=2)
    for attempt in (1, 2):
        request = run_service_pb2.ReleaseRunRequest(key=server.key(attempt=attempt))
        assert server.runs.ReleaseRun(request, timeout=WAIT_SECONDS).freed_bytes >= 0
    server.start_run("01HELD", script={"hold_at": 2, "until_file": str(root / "never")})
    server.wait_for_step(1, "01HELD")
    watching.join(WAIT_SECONDS)
    node.cancel()
