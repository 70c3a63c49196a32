"""How long it takes from StartTraining to the first optimizer step's event at the client, and where the time goes.

Both services run as they do for a user, as processes of their own, with the real engine. `first`: the node's first job
on the base: no engine process is there, no kernel was compiled, no 4-bit copy kept. `fresh`: no engine process is
there. `spare`: one is, without a base. `warm`: it has the base in memory, from an earlier job. `other`: the same, for a
job of another rank and other layers. Every job was planned before, so its data lies on the node. Each row prints when
each thing was done, in milliseconds since the call, by the clock of whoever did it; all are on one machine. A row is in
the file as soon as it was measured.

    python -m benchmarks.start_up --size 3B --cases first warm other spare fresh peer --out rows.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import random_models
from benchmarks.start_up_marks import LOG_MARKS, LogLines, engine_marks, name_of
from tunesmith.common.v1 import event_pb2, training_spec_pb2
from tunesmith.control.v1 import node_service_pb2, project_service_pb2
from tunesmith_cli.services import NODE_NAME, Pair, PairConfig
from tunesmith_client import Client, ClientConfig

CASES = ("first", "fresh", "spare", "warm", "other", "peer")
_NUM_EXAMPLES = 2000
_WAIT_SECONDS = 300.0
# Between two jobs: what an engine does behind a run's end is over, control is connected to a node that began anew, and
# nothing of either is measured.
_IDLE_SECONDS = 2.0
_ENGINE_VARIABLE = "TUNESMITH_GPU_SPARE_ENGINES"


@dataclass(kw_only=True)
class Row:
    """One measured start. `marks` are (what, milliseconds since the call)."""

    case: str
    seconds: float = 0.0
    step_seconds: float = 0.0
    loss: float = 0.0
    marks: list[tuple[str, float]] = field(default_factory=list)


def _set_spares(num_spares: int) -> None:
    os.environ[_ENGINE_VARIABLE] = str(num_spares)


def enlarge_tokenizer(directory: Path, vocabulary: int) -> None:
    """Give a random model's tokenizer as many tokens as the model has, by merges that mean nothing: a real one takes
    time to read.
    """
    path = directory / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    tokens: dict[str, int] = document["model"]["vocab"]
    letters = [token for token in tokens if len(token) == 1]
    merges = []
    for left in itertools.chain(letters, [one + other for one in letters for other in letters]):
        for right in letters if len(tokens) < vocabulary else ():
            if len(tokens) < vocabulary and left + right not in tokens:
                tokens[left + right] = len(tokens)
                merges.append([left, right])
    document["model"]["merges"] = merges
    path.write_text(json.dumps(document), encoding="utf-8")


def _wait_for(what: str, condition: Callable[[], Any]) -> Any:
    ends_at = time.monotonic() + _WAIT_SECONDS
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > ends_at:
            raise TimeoutError(f"waited {_WAIT_SECONDS:.0f} s for {what}")
        time.sleep(0.02)


class Bench:
    """A pair over one data directory; its GPU service can be started again with or without a spare engine."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self._options = options
        self._directory = directory
        models = directory / "models"
        if options.model:
            models = Path(options.model[0])
            self.base_model = options.model[1]
        else:
            self.base_model = random_models.place(models, options.size)
            enlarge_tokenizer(models / self.base_model, random_models.SHAPES[options.size].vocabulary)
        self.log = LogLines()
        config = PairConfig(
            data_directory=directory / "data",
            models_directory=models,
            control_address="127.0.0.1:0",
            gpu_address="127.0.0.1:0",
        )
        config.data_directory.mkdir(parents=True)
        self._pair = Pair(config, sink=self.log.add)
        self._projects: dict[str, int] = {}

    def __enter__(self) -> Bench:
        _set_spares(0)
        self._pair.__enter__()
        self._client = Client(config=ClientConfig(address=self._pair.address))
        self._wait_for_node()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._client.close()
        self._pair.__exit__(None, None, None)

    def _wait_for_node(self) -> None:
        def is_there() -> bool:
            nodes = self._client.nodes.list()
            return any(node.state == node_service_pb2.NODE_STATE_REACHABLE for node in nodes) and any(
                model.name == self.base_model for model in self._client.models.list()
            )

        _wait_for("the node", is_there)

    def restart_node(self, *, num_spares: int) -> None:
        """The GPU service again, without what its engines held; with a spare, once that is ready."""
        began = time.time()
        self._pair.gpu.stop()
        _set_spares(num_spares)
        self._pair.start_gpu().wait_ready(stopped=self._pair.stopped)
        self._wait_for_node()
        if num_spares:
            _wait_for("a spare", lambda: any(line["event"] == "engine-ready" for _, line in self.log.since(began)))

    def project(self, name: str, *, rank: int, targets: Sequence[str]) -> int:
        """A project whose data lies on the node, by an exact plan; its id."""
        if name in self._projects:
            return self._projects[name]
        options = self._options
        path = self._directory / f"{name}.jsonl"
        draw = random.Random(0)
        with path.open("w", encoding="utf-8") as file:
            for number in range(_NUM_EXAMPLES):
                length = max(8, min(round(draw.lognormvariate(5.4, 0.6)), options.max_length - 40))
                row = {"prompt": f"Question {number}: ", "completion": "".join(draw.choices("abcdefgh ", k=length))}
                file.write(json.dumps(row) + "\n")
        dataset = self._client.datasets.upload(path, name=name)
        source = training_spec_pb2.TraitDataset(dataset_id=dataset.dataset_id, percentage=100)
        settings = training_spec_pb2.Hyperparameters(
            num_steps=options.steps,
            max_length=options.max_length,
            save_every_steps=0,
            batch=training_spec_pb2.Batch(tokens=options.tokens),
            lora=training_spec_pb2.Lora(rank=rank, target_modules=list(targets)),
        )
        if options.trainer:
            settings.trainer = options.trainer
        project = self._client.projects.create(
            project_service_pb2.Project(
                name=name,
                base_model=self.base_model,
                model_type="llama",
                training_type=options.training_type,
                output_directory=f"./{name}",
                traits=[training_spec_pb2.Trait(trait_type="trait", datasets=[source])],
                hyperparameters=settings,
            )
        )
        began = time.monotonic()
        plan = self._client.jobs.plan(project.project_id).plan
        seconds = time.monotonic() - began
        print(f"planned {name}: {seconds:.2f} s, trainer {plan.resolved.trainer}, {plan.num_steps} steps", flush=True)
        self._projects[name] = project.project_id
        return self._projects[name]

    def measure(self, case: str, project_id: int) -> Row:
        """One job to its end; timed up to its first step."""
        if case != "first":
            time.sleep(_IDLE_SECONDS)
        seen: list[tuple[float, event_pb2.Event]] = []
        began, clock = time.time(), time.perf_counter()
        job = self._client.jobs.start(project_id)
        replied = time.time()
        row = Row(case=case)
        with self._client.jobs.watch(job.job_id) as events:
            for event in events:
                seen.append((time.time(), event))
                if event.payload.HasField("step") and not row.seconds:
                    row.seconds = time.perf_counter() - clock
                    row.step_seconds, row.loss = event.payload.step.step_seconds, event.payload.step.loss
        state = event_pb2.JobState.Name(self._client.jobs.get(job.job_id).state)
        if not row.seconds or state != "JOB_STATE_SUCCEEDED":
            for line in self.log.raw[-40:]:
                print(line[:400])
            for path in self._directory.glob("data/node-*/engines/*/engine.log"):
                print(path.read_text()[-3000:])
            raise RuntimeError(f"job {job.job_id} ended {state}")
        marks = [("client: StartTraining answered", replied)]
        marks += [
            (LOG_MARKS[line["event"]], said)
            for said, line in self.log.since(began)
            if line.get("event") in LOG_MARKS and line.get("job_id", job.job_id) == job.job_id
        ]
        run = self._directory / "data" / f"node-{NODE_NAME}" / "runs" / job.job_id / "1"
        for name in ("run.json", "planner-request.json"):
            if (run / name).exists():
                marks.append((f"file: {name} written", (run / name).stat().st_mtime))
        marks += engine_marks(list(self._directory.glob("data/node-*/engines/*/engine.log")), began)
        for at, event in seen:
            name = name_of(event.payload)
            if name:
                marks.append(
                    (
                        f"event: {name} (+{1000 * (at - event.time.ToNanoseconds() / 1e9):.0f} at client)",
                        event.time.ToNanoseconds() / 1e9,
                    )
                )
            if event.payload.HasField("step"):
                break
        marks.append(("client: first STEP", began + row.seconds))
        row.marks = [
            (what, 1000 * (at - began))
            for what, at in sorted(marks, key=lambda mark: mark[1])
            if at <= began + row.seconds + 0.001
        ]
        return row


def measure_peer(bench: Bench, options: argparse.Namespace) -> Row:
    """Plain transformers, PEFT and bitsandbytes: a process to its first step, on the same base."""
    models = Path(options.model[0]) if options.model else bench._directory / "models"
    command = [sys.executable, "-m", "benchmarks.start_up_peer", str(models / bench.base_model)]
    began = time.time()
    done = subprocess.run(
        [*command, "--training-type", options.training_type], check=True, stdout=subprocess.PIPE, encoding="utf-8"
    )
    told = json.loads(done.stdout.splitlines()[-1])
    row = Row(case="peer", seconds=told["first_step"] - began, loss=told["loss"])
    row.marks = [(what, 1000 * (at - began)) for what, at in told["marks"]]
    return row


def _show(row: Row, *, marks: bool) -> None:
    print(
        f"\n== {row.case}: {row.seconds:.3f} s to the first step (the step itself {row.step_seconds:.3f} s, "
        f"loss {row.loss:.4f})",
        flush=True,
    )
    before = 0.0
    for what, at in row.marks if marks else ():
        print(f"  {at:8.0f} ms  +{at - before:6.0f}  {what}")
        before = at


def _save(options: argparse.Namespace, rows: Sequence[Row]) -> None:
    """What was measured so far: a start that fails, or time that ends, takes none of it along."""
    # What was measured, not where it lay.
    asked = {name: value for name, value in vars(options).items() if name not in ("model", "out")}
    told = {
        "machine": platform.platform(),
        "options": {**asked, "model": options.model and options.model[1]},
        "rows": [vars(row) for row in rows],
    }
    unfinished = options.out.with_name(f".{options.out.name}")
    unfinished.write_text(json.dumps(told, indent=1, default=str), encoding="utf-8")
    unfinished.replace(options.out)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(random_models.SHAPES), default="tiny")
    parser.add_argument("--model", nargs=2, metavar=("DIRECTORY", "NAME"), help="a model that is there, instead")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--training-type", default="qlora")
    parser.add_argument("--trainer", default="", help="fast, reference, auto; empty: the plan's default")
    parser.add_argument("--tokens", type=int, default=8192, help="of a step")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    rows: list[Row] = []

    def add(row: Row) -> None:
        _show(row, marks=sum(other.case == row.case for other in rows) == 0 or row.case in ("warm", "fresh"))
        rows.append(row)
        if options.out:
            _save(options, rows)

    with tempfile.TemporaryDirectory(prefix="start-up-") as name, Bench(options, Path(name)) as bench:
        if set(options.cases) - {"peer"}:
            # Always: what comes behind it finds compiled kernels and the base's 4-bit copy.
            first = bench.project("first", rank=16, targets=())
            add(bench.measure("first", first))
        if "other" in options.cases:
            other = bench.project("other", rank=8, targets=("q_proj", "v_proj"))
        for _ in range(options.repeats):
            if "warm" in options.cases:
                add(bench.measure("warm", first))
            if "other" in options.cases:
                add(bench.measure("other", other))
        for number in range(options.repeats):
            for case, num_spares in (("fresh", 0), ("spare", 1)):
                if case in options.cases:
                    bench.restart_node(num_spares=num_spares)
                    add(bench.measure(case, first))
            if number == 0 and "peer" in options.cases:
                add(measure_peer(bench, options))
    print("\n| case | starts | median s | lowest | highest | of it the step |\n|---|---|---|---|---|---|")
    for case in CASES:
        times = [row.seconds for row in rows if row.case == case]
        if times:
            step = statistics.median(row.step_seconds for row in rows if row.case == case)
            print(
                f"| {case} | {len(times)} | {statistics.median(times):.3f} | {min(times):.3f} | {max(times):.3f} | "
                f"{step:.3f} |"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
