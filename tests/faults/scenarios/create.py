"""Many clients create the same few things at once while control is killed at its commit and at its reply (R1, R2)."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from tests.faults.driver import World, WorldConfig
from tests.faults.driver.operations import LoggedClient
from tests.faults.driver.verdict import judge
from tests.faults.driver.world import Refused
from tests.faults.scenario import Finding, Scenario, Trial
from tunesmith.common.v1 import training_spec_pb2
from tunesmith.control.v1 import job_service_pb2, project_service_pb2

_NUM_REQUEST_IDS = 8
_NUM_JOB_REQUEST_IDS = 3
# Of a body; one call in so many has another than the rest of its request id.
_OTHER_BODY = 9
_FAILPOINTS = ("store.before-commit", "store.after-commit", "reply.before-send")


def run(trial: Trial) -> list[Finding]:
    """At the full numbers."""
    return create_at_once(trial)


def create_at_once(trial: Trial, *, num_clients: int = 64, num_kills: int = 12) -> list[Finding]:
    """Creates go on until control was killed often enough, and every one of them was answered."""
    with World(WorldConfig(directory=trial.directory, seed=trial.seed)) as world:
        dataset_id = world.upload("rows")
        base = _project(world, "base", dataset_id)
        request = project_service_pb2.CreateProjectRequest(project=base)
        project_id = world.client.call("CreateProject", request).project.project_id
        enough = threading.Event()
        creators = [
            _Creator(world.new_client(f"client-{number}"), number, base, project_id, enough)
            for number in range(num_clients)
        ]
        with ThreadPoolExecutor(num_clients) as pool:
            running = [pool.submit(creator.run) for creator in creators]
            try:
                for _ in range(num_kills):
                    name = world.random.choice(_FAILPOINTS)
                    world.failpoints.arm(name, after=world.random.randint(1, 40))
                    world.wait_for("a kill", lambda: not world.failpoints.armed())
            finally:
                enough.set()
            for future in running:
                future.result()
        world.heal()
        world.job_ids += sorted({job_id for creator in creators for job_id in creator.job_ids})
        world.wait_until_over()
        world.stop()
        return judge(world)


def _project(world: World, name: str, dataset_id: int) -> project_service_pb2.Project:
    source = training_spec_pb2.TraitDataset(dataset_id=dataset_id, percentage=100)
    return project_service_pb2.Project(
        name=name,
        base_model=world.base_model,
        model_type="llama",
        training_type="lora",
        output_directory=f"./{name}",
        traits=[training_spec_pb2.Trait(trait_type="trait", datasets=[source])],
        hyperparameters=training_spec_pb2.Hyperparameters(num_steps=2),
    )


class _Creator:
    """One client that creates what all the others create too."""

    def __init__(
        self,
        client: LoggedClient,
        number: int,
        base: project_service_pb2.Project,
        project_id: int,
        enough: threading.Event,
    ) -> None:
        self.job_ids: set[str] = set()
        self._client = client
        self._number = number
        self._base = base
        self._project_id = project_id
        self._enough = enough

    def run(self) -> None:
        turn = self._number
        while not self._enough.is_set() or turn < self._number + _NUM_REQUEST_IDS:
            self._create_project(turn)
            if turn % _NUM_REQUEST_IDS < _NUM_JOB_REQUEST_IDS:
                self._start_job(turn)
            turn += 1

    def _create_project(self, turn: int) -> None:
        project = project_service_pb2.Project()
        project.CopyFrom(self._base)
        wave, identity = divmod(turn, _NUM_REQUEST_IDS)
        has_other_body = (turn + self._number) % _OTHER_BODY == 0
        project.name = f"{'other' if has_other_body else 'project'}-{wave}-{identity}"
        project.output_directory = f"./{project.name}"
        request = project_service_pb2.CreateProjectRequest(project=project, request_id=f"project-{wave}-{identity}")
        self._call("CreateProject", request)

    def _start_job(self, turn: int) -> None:
        request = job_service_pb2.StartTrainingRequest(
            project_id=self._project_id, request_id=f"job-{turn % _NUM_REQUEST_IDS}", max_retries=100
        )
        answer = self._call("StartTraining", request)
        if answer is not None:
            self.job_ids.add(answer.job.job_id)

    def _call(
        self, method: str, request: project_service_pb2.CreateProjectRequest | job_service_pb2.StartTrainingRequest
    ) -> job_service_pb2.StartTrainingResponse | None:
        try:
            answer: job_service_pb2.StartTrainingResponse = self._client.call(method, request)
        except Refused as refused:
            # Its request id, or its name, has another body already.
            if refused.code != "ALREADY_EXISTS":
                raise
            return None
        return answer


SCENARIO = Scenario(
    name="create",
    promises=("R1", "R2"),
    num_trials=12,
    trial_seconds=50.0,
    run=run,
)
