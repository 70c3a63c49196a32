"""A loaded model with its data: measures, trains, saves. Ends by returning, StopRequested or RunFailure.

The model, the optimizer and accelerate live here and nowhere else, so that they are gone when the session is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from gpu_service.domain.defaults import RESIDENT
from gpu_service.domain.planned_data import ExampleReference, PlannedData
from gpu_service.engine import libraries
from gpu_service.engine.devices import Device
from gpu_service.engine.failures import library_versions
from gpu_service.engine.loading import Loaded
from gpu_service.engine.pace import each_module
from gpu_service.engine.reporter import Reporter
from gpu_service.engine.request import RunRequest
from gpu_service.engine.stopping import StopRequested, StopSwitch
from gpu_service.engine.trainers import make_trainer
from gpu_service.engine.training import random_state
from gpu_service.engine.training.batches import MicroBatchLimit
from gpu_service.engine.training.checkpoint import Identity
from gpu_service.engine.training.checkpoint_keeper import CheckpointKeeper
from gpu_service.engine.training.evaluation import as_history, evaluate
from gpu_service.engine.training.generate import answer, stop_token_ids
from gpu_service.engine.training.loop import TrainingLoop, tell_notices
from gpu_service.engine.training.objectives import Objective, make_objective
from gpu_service.engine.training.out_of_memory import PassSize
from gpu_service.engine.training.progress import TrainingProgress
from gpu_service.engine.training.rehearsal import Rehearsed, find_largest_held_out, find_largest_steps
from gpu_service.engine.training.rises import find_rises
from gpu_service.journal.failpoints import failpoint
from tunesmith.common.v1 import event_pb2, plan_pb2

_SAMPLE_TOKENS = 64
# The first step makes the optimizer's state, the second has it from the start.
_REHEARSALS = 2


class Session:
    """Made once the model is loaded; `train` is called once."""

    def __init__(
        self,
        *,
        request: RunRequest,
        plan: plan_pb2.Plan,
        data: PlannedData,
        loaded: Loaded,
        method: Any,
        device: Device,
        switch: StopSwitch,
        reporter: Reporter,
        objective: Objective | None = None,
    ) -> None:
        """`objective` None is the plan's."""
        self._request = request
        self._method = method
        self._device = device
        self._switch = switch
        self._reporter = reporter
        self._plan = plan
        self._data = data
        self._loaded = loaded
        settings = plan.resolved
        self._trainer = make_trainer(loaded.model, settings, device.torch_device)
        self._accelerator = self._trainer.accelerator
        self._model, self._optimizer = self._trainer.model, self._trainer.optimizer
        self._objective = objective or make_objective(settings)
        self._checkpoints = CheckpointKeeper(
            directory=request.checkpoints_directory,
            identity=Identity(
                data_digest=plan.data_digest,
                spec_digest=request.spec_digest,
                weights_digest=request.weights_digest,
                training_type=plan.training_type,
                num_steps=data.num_steps,
            ),
            settings=settings,
            model=self._model,
            unwrapped_model=self._trainer.saved,
            optimizer=self._optimizer,
            scaler=self._accelerator.scaler,
            data=data,
            objective=self._objective,
            device=device.torch_device,
            reporter=reporter,
            pace=switch,
        )
        self._progress = TrainingProgress()
        # Memory ran out, and less is kept than was planned.
        self._keeps_less = False

    def train(self) -> None:
        """From the base's losses to the artifacts. The base is as it was loaded when this ends, however it ends."""
        try:
            self._train()
        finally:
            self._trainer.release()

    def _train(self) -> None:
        reasons = "; ".join(filter(None, (self._plan.trainer_reason, self._plan.memory_reason)))
        message = f"trained by {self._trainer.description}: {reasons}"
        self._reporter.emit(event_pb2.LogEvent(level="info", message=message))
        # Evaluations count too: they may take more than the steps.
        self._device.start_counting()
        resume = self._request.resume
        if resume is not None:
            self._progress = self._checkpoints.resume(resume.directory, resume.source)
        else:
            self._switch.check()
            self._measure(event_pb2.EVALUATION_MOMENT_BASE)
            self._answer_samples(event_pb2.EVALUATION_MOMENT_BASE)
            # Dropout must not depend on what was measured before the first step.
            random_state.seed_all(self._plan.resolved.seed)
        self._reporter.enter_phase("TRAINING")
        loop = self._make_loop()
        try:
            stopped_early = loop.run()
        except StopRequested:
            self._report_memory(is_whole=False)
            raise
        self._report_memory(is_whole=not stopped_early)
        self._switch.check()
        self._measure(event_pb2.EVALUATION_MOMENT_FINAL)
        # No step comes after it that would.
        tell_notices(self._model, self._reporter)
        # Nothing is played any more, and answers have no other way to find memory.
        self._trainer.give_up_recordings()
        self._answer_samples(event_pb2.EVALUATION_MOMENT_FINAL)
        self._save(stopped_early)

    def rehearse(self) -> Rehearsed:
        """Make the plan's largest evaluation, and its largest steps twice each: what memory they come to.

        Saves nothing. Called once, alone.
        """
        self._device.start_counting()
        loop = self._make_loop()
        limit = MicroBatchLimit.of(self._plan.resolved.batch, self._loaded.config)
        largest = find_largest_steps(self._data, limit)
        self._reporter.enter_phase("EVALUATING")
        for part in find_largest_held_out(self._data, limit):
            self._evaluate(part, limit, event_pb2.EVALUATION_MOMENT_BASE)
        self._device.peak_bytes()
        self._reporter.enter_phase("TRAINING")
        peak_bytes = loop.rehearse([one.step for one in largest], _REHEARSALS)
        return Rehearsed(
            peak_bytes=peak_bytes, step_tokens=largest[0].step_tokens, longest_tokens=largest[0].longest_tokens
        )

    def _make_loop(self) -> TrainingLoop:
        return TrainingLoop(
            accelerator=self._accelerator,
            model=self._model,
            optimizer=self._optimizer,
            data=self._data,
            settings=self._plan.resolved,
            objective=self._objective,
            pass_size=replace(
                self._pass_size(self._keep_less, is_one_pass=self._trainer.is_one_pass),
                last_resort=self._trainer.narrow_gradients,
            ),
            examples_per_epoch=self._plan.examples_per_epoch,
            checkpoints=self._checkpoints,
            progress=self._progress,
            device=self._device,
            switch=self._switch,
            reporter=self._reporter,
            evaluate=lambda: self._measure(event_pb2.EVALUATION_MOMENT_DURING),
        )

    def _report_memory(self, *, is_whole: bool) -> None:
        """Say what memory came to.

        Only a run that made every pass of its plan, by the trainer that its node measures it as, tells how good the
        prediction was.
        """
        memory = self._plan.memory
        is_whole = is_whole and self._request.resume is None
        is_whole = is_whole and self._request.trainer in ("", self._plan.resolved.trainer)
        is_whole = is_whole and not self._progress.pass_limits and not self._keeps_less
        self._reporter.emit(
            event_pb2.MemoryMeasuredEvent(
                predicted_bytes=memory.peak_bytes,
                peak_bytes=self._device.peak_bytes(),
                analytic_bytes=memory.analytic_bytes if is_whole else 0,
            )
        )

    def _keep_less(self) -> str:
        """First what costs the least time. What a project asked for stays so, and smaller passes are left."""
        described = self._stream_weights()
        asked = self._request.spec.hyperparameters
        if not described and not (asked.HasField("gradient_checkpointing") or asked.HasField("recomputation")):
            described = self._trainer.recompute_more()
        self._keeps_less = self._keeps_less or bool(described)
        return described

    def _stream_weights(self) -> str:
        """All that an evaluation can do without: it keeps nothing for a backward pass."""
        # Nobody asks for recordings, and no plan counts on them.
        described = self._trainer.give_up_recordings()
        if not described and self._request.spec.hyperparameters.base_weights != RESIDENT:
            described = self._trainer.stream_weights()
        self._keeps_less = self._keeps_less or bool(described)
        return described

    def _pass_size(self, keep_less: Callable[[], str], *, is_one_pass: bool = False) -> PassSize:
        return PassSize(
            keep_less=keep_less,
            is_one_pass=is_one_pass,
            planned=MicroBatchLimit.of(self._plan.resolved.batch, self._loaded.config),
            data=self._data,
            device=self._device,
            reporter=self._reporter,
            progress=self._progress,
        )

    def _measure(self, moment: event_pb2.EvaluationMoment.ValueType) -> None:
        if not any(source.held_out for source in self._data.sources):
            return
        self._reporter.enter_phase("EVALUATING")
        held_out = self._data.held_out_examples()
        event = self._pass_size(self._stream_weights).carry_out(
            lambda limit: self._evaluate(held_out, limit, moment), held_out, step=self._progress.steps_done
        )
        if event is not None:
            self._reporter.emit(event)
            self._progress.evaluations.append(as_history(event))
            self._warn_of_held_out(event)

    def _evaluate(
        self,
        references: Sequence[ExampleReference],
        limit: MicroBatchLimit,
        moment: event_pb2.EvaluationMoment.ValueType,
    ) -> event_pb2.EvaluationEvent | None:
        return evaluate(
            self._model,
            self._data,
            references,
            objective=self._objective,
            device=self._device.torch_device,
            limit=limit,
            moment=moment,
            step=self._progress.steps_done,
            switch=self._switch,
        )

    def _warn_of_held_out(self, event: event_pb2.EvaluationEvent) -> None:
        for value in event.losses:
            if value.dataset_id and not value.HasField("loss"):
                self._reporter.warn(
                    "non-finite-loss",
                    f"the held-out loss of trait {value.trait_type}, dataset {value.dataset_id} is not a finite number "
                    f"after step {event.step}",
                    trait_type=value.trait_type,
                    dataset_id=value.dataset_id,
                )
        for rise in find_rises(self._progress.evaluations, self._plan.resolved.warn_after_rises):
            self._reporter.warn(
                "held-out-loss-rising",
                f"the held-out loss of trait {rise.trait_type} has risen {rise.num_rises} evaluations in a row, from "
                f"{rise.first:.4f} to {rise.last:.4f}",
                trait_type=rise.trait_type,
            )

    def _answer_samples(self, moment: event_pb2.EvaluationMoment.ValueType) -> None:
        prompts = self._request.spec.sample_prompts
        if not prompts:
            return
        self._reporter.enter_phase("EVALUATING")
        tokenizer = self._loaded.need_tokenizer()
        stop_ids = stop_token_ids(self._request.model_directory, self._loaded.base, tokenizer)
        for sample in prompts:
            self._switch.check()
            with self._accelerator.autocast(), each_module(self._switch.check):
                text = answer(
                    self._loaded.model,
                    tokenizer,
                    sample.prompt,
                    max_new_tokens=sample.max_new_tokens or _SAMPLE_TOKENS,
                    stop_ids=stop_ids,
                    device=self._device.torch_device,
                )
            event = event_pb2.SampleEvent(
                moment=moment,
                step=self._progress.steps_done,
                trait_type=sample.trait_type,
                prompt=sample.prompt,
                answer=text,
            )
            self._reporter.emit(event)
            name = event_pb2.EvaluationMoment.Name(moment).removeprefix("EVALUATION_MOMENT_")
            self._progress.samples.append(
                {
                    "moment": name,
                    "step": event.step,
                    "trait_type": event.trait_type,
                    "prompt": event.prompt,
                    "answer": text,
                }
            )

    def _save(self, stopped_early: bool) -> None:
        self._reporter.enter_phase("SAVING")
        # Written by the libraries, whom the fast path has not needed so far.
        libraries.need(self._switch.check)
        from gpu_service.engine.artifacts import ArtifactRequest, exporting, write_all
        from gpu_service.engine.artifacts.export_source import open_source

        written = write_all(
            ArtifactRequest(
                directory=self._request.artifacts_directory,
                model_directory=self._request.model_directory,
                job_id=self._request.job_id,
                spec=self._request.spec,
                plan=self._plan,
                trains_adapter=self._method.TRAINS_ADAPTER,
                model=self._trainer.saved,
                tokenizer=self._loaded.need_tokenizer(),
                stored_dtype=self._loaded.stored_dtype,
                progress=self._progress,
                stopped_early=stopped_early,
                versions=library_versions(),
                export_source=open_source(
                    request=self._request,
                    plan=self._plan,
                    model=self._trainer.saved,
                    loaded=self._loaded,
                ),
            ),
            self._switch.check,
            self._switch,
        )
        failpoint("artifacts.before-event")
        self._reporter.emit(self._realized(stopped_early))
        for export in written.exports:
            self._reporter.emit(export)
            if not export.accepted:
                # What was trained is whole; a form of it that is not right is left out, and said.
                self._reporter.warn(exporting.WARNING_CODE, exporting.describe_refusal(export))
        for problem in written.problems:
            self._reporter.warn(exporting.FAILED_CODE, problem)
        for artifact in written.artifacts:
            self._reporter.emit(artifact)

    def _realized(self, stopped_early: bool) -> event_pb2.RealizedEvent:
        """What was trained on, counted from the batches, over the run and within its first epoch."""
        progress = self._progress
        planned = {(row.trait_type, row.dataset_id): row for row in self._plan.datasets if not row.held_out}
        rows: list[plan_pb2.DatasetPlan] = []
        for index, source in enumerate(self._data.sources):
            count = progress.counts.get(index)
            if source.held_out or count is None:
                continue
            row = plan_pb2.DatasetPlan()
            row.CopyFrom(planned[source.trait_type, source.dataset_id])
            row.num_examples = count.epoch_examples
            row.num_tokens = count.epoch_tokens
            row.num_target_tokens = count.epoch_target_tokens
            row.run_examples = count.num_examples
            row.run_tokens = count.num_tokens
            row.run_target_tokens = count.num_target_tokens
            rows.append(row)
        return event_pb2.RealizedEvent(
            datasets=rows,
            num_steps=progress.steps_done,
            total_examples=progress.num_examples,
            total_tokens=progress.num_tokens,
            total_target_tokens=progress.num_target_tokens,
            # Taken again from the tokens and steps that were read: a run that stopped early has another one.
            data_digest=self._data.compute_digest(progress.steps_done),
            training_seconds=progress.training_seconds,
            stopped_early=stopped_early,
        )
