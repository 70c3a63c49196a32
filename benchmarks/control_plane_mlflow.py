"""MLflow's own way of taking in metrics: a tracking server over SQLite and one client over REST.

`python control_plane_mlflow.py DIRECTORY`, by an interpreter that has mlflow; the last line on standard output is JSON.
Leans on nothing of ours.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

SINGLE, BATCHES, BATCH = 200, 10, 1000
PATIENCE_SECONDS = 90.0


def main() -> None:
    """Starts the server, logs, and says how many metrics a second were taken."""
    directory = Path(sys.argv[1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{directory / 'mlflow.db'}"]
    command += ["--default-artifact-root", str(directory / "artifacts")]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    server = subprocess.Popen(command, stdout=sys.stderr, env=environment, start_new_session=True)
    try:
        _wait(address)
        sys.stdout.write(json.dumps(_measure(address)) + "\n")
    finally:
        os.killpg(server.pid, 9)
        server.wait()


def _wait(address: str) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):
                return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def _measure(address: str) -> dict[str, Any]:
    import mlflow
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=address)
    run = client.create_run(client.create_experiment("rows")).info.run_id
    client.log_metric(run, "loss", 1.0, step=0)
    took = []
    for step in range(1, SINGLE + 1):
        started = time.perf_counter()
        client.log_metric(run, "loss", 1.0 / step, step=step)
        took.append(time.perf_counter() - started)
    started = time.perf_counter()
    for batch in range(BATCHES):
        first = SINGLE + 1 + batch * BATCH
        now = int(time.time() * 1000)
        client.log_batch(run, metrics=[Metric("loss", 1.0, now, step) for step in range(first, first + BATCH)])
    batch_seconds = time.perf_counter() - started
    took.sort()
    return {
        "version": mlflow.__version__,
        "log_metric_per_second": len(took) / sum(took),
        "log_metric_p50_ms": took[len(took) // 2] * 1e3,
        "log_metric_p99_ms": took[int(len(took) * 0.99)] * 1e3,
        "log_batch_metrics_per_second": BATCHES * BATCH / batch_seconds,
    }


if __name__ == "__main__":
    main()
