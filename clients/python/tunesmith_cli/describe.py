"""What an event says, as one line for people; pure, one function for each kind in a table. Shows nothing itself."""

from collections.abc import Callable, Iterable

from tunesmith.common.v1 import errors_pb2, event_pb2
from tunesmith_cli.text import byte_count, duration, indented_lines, printable
from tunesmith_client import reason_name, state_name


def describe(event: event_pb2.Event) -> str:
    """The line for an event; empty for one that is not worth a line, or of a kind that this version does not know."""
    function = _BY_KIND.get(event.kind)
    return printable(function(event.payload)) if function is not None else ""


def describe_lines(event: event_pb2.Event) -> list[str]:
    """What an event says where there is room: an answer keeps its own lines; anything else is its one line, or none."""
    if event.kind == event_pb2.EVENT_KIND_SAMPLE:
        sample = event.payload.sample
        return [
            f"answer ({moment_name(sample.moment)}) to:",
            *indented_lines(sample.prompt, 4),
            "  is:",
            *indented_lines(sample.answer, 4),
        ]
    line = describe(event)
    return [line] if line else []


def loss_text(loss: float | None) -> str:
    """`2.3456`, or `not finite`."""
    return f"{loss:.4f}" if loss is not None else "not finite"


def loss_of(message: event_pb2.StepEvent | event_pb2.EvaluationEvent | event_pb2.LossValue) -> float | None:
    """The loss, or None where it was not a finite number."""
    return message.loss if message.HasField("loss") else None


def failure_text(failure: errors_pb2.Failure) -> str:
    """Reason, stage, the library's own exception, message and file of a failure."""
    parts = [reason_name(failure.reason)]
    if failure.stage:
        parts.append(f"in {failure.stage}")
    if failure.exception_type:
        parts.append(f"({failure.exception_type})")
    text = " ".join(parts) + f": {failure.message}"
    return f"{text} [{failure.file}]" if failure.file else text


def phase_name(phase: int) -> str:
    """`training` for the enum's number."""
    value = event_pb2.Phase.DESCRIPTOR.values_by_number.get(phase)
    return value.name.removeprefix("PHASE_").lower() if value is not None else str(phase)


def stage_name(stage: int) -> str:
    """`weights` for the enum's number."""
    value = event_pb2.LoadingStage.DESCRIPTOR.values_by_number.get(stage)
    return value.name.removeprefix("LOADING_STAGE_").lower() if value is not None else str(stage)


def moment_name(moment: int) -> str:
    """`base`, `during` or `final`."""
    return event_pb2.EvaluationMoment.Name(moment).removeprefix("EVALUATION_MOMENT_").lower()  # type: ignore[arg-type]


def trait_losses(values: Iterable[event_pb2.LossValue]) -> str:
    """`coding 2.3456, reasoning 1.2345` for the whole-trait losses; by name, so that each keeps its place."""
    traits = sorted((value.trait_type, loss_text(loss_of(value))) for value in values if not value.dataset_id)
    return ", ".join(f"{trait} {loss}" for trait, loss in traits)


def _job_state(payload: event_pb2.EventPayload) -> str:
    change = payload.job_state
    text = f"job {state_name(change.state)}"
    if change.node:
        text += f" on {change.node}"
    if change.message:
        text += f" ({change.message})"
    return f"{text}: {failure_text(change.failure)}" if change.HasField("failure") else text


def _run_state(payload: event_pb2.EventPayload) -> str:
    if not payload.run_state.HasField("failure"):
        return ""
    return f"run failed: {failure_text(payload.run_state.failure)}"


def _phase(payload: event_pb2.EventPayload) -> str:
    return f"phase {phase_name(payload.phase.phase)}"


def _loading(payload: event_pb2.EventPayload) -> str:
    loading = payload.loading
    stage = stage_name(loading.stage)
    if loading.status == event_pb2.STAGE_STATUS_FINISHED:
        details = ", ".join(f"{name} {value}" for name, value in sorted(loading.details.items()))
        return f"loading {stage}: done in {loading.seconds:.1f} s" + (f" ({details})" if details else "")
    if loading.status == event_pb2.STAGE_STATUS_FAILED:
        return f"loading {stage}: failed: {failure_text(loading.failure)}"
    if loading.status == event_pb2.STAGE_STATUS_PROGRESS:
        return f"loading {stage}: {loading.done} of {loading.total} {loading.unit}"
    return f"loading {stage}: started"


def _plan(payload: event_pb2.EventPayload) -> str:
    plan = payload.plan
    return (
        f"plan: {plan.num_steps} steps, {plan.total_examples} examples, {plan.total_tokens} tokens, "
        f"{plan.num_covered_linears} of {plan.num_linears} linear layers, on {plan.device}"
    )


def _step(payload: event_pb2.EventPayload) -> str:
    step = payload.step
    traits = trait_losses(step.trait_losses)
    return (
        f"step {step.step}/{step.total_steps}  loss {loss_text(loss_of(step))}"
        + (f" ({traits})" if traits else "")
        + f"  lr {step.learning_rate:.2e}  {step.tokens_per_second:.0f} tok/s  eta {duration(step.remaining_seconds)}"
    )


def _evaluation(payload: event_pb2.EventPayload) -> str:
    evaluation = payload.evaluation
    where = moment_name(evaluation.moment)
    return f"held-out loss ({where}, step {evaluation.step}): {trait_losses(evaluation.losses)}"


def _sample(payload: event_pb2.EventPayload) -> str:
    sample = payload.sample
    return f"answer ({moment_name(sample.moment)}) to {sample.prompt!r}: {sample.answer!r}"


def _checkpoint(payload: event_pb2.EventPayload) -> str:
    checkpoint = payload.checkpoint
    status = event_pb2.CheckpointStatus.Name(checkpoint.status).removeprefix("CHECKPOINT_STATUS_").lower()
    losses = f", held-out loss {loss_text(checkpoint.held_out_loss)}" if checkpoint.HasField("held_out_loss") else ""
    best = ", the best so far" if checkpoint.best else ""
    return f"checkpoint {checkpoint.name} {status} ({byte_count(checkpoint.size_bytes)}){losses}{best}"


def _resumed(payload: event_pb2.EventPayload) -> str:
    resumed = payload.resumed
    probe = ""
    if resumed.HasField("saved_probe_loss") and resumed.HasField("measured_probe_loss"):
        probe = f", probe loss {resumed.saved_probe_loss:.6f} when saved, {resumed.measured_probe_loss:.6f} now"
    return f"resumed from step {resumed.from_step} ({resumed.checkpoint}){probe}"


def _micro_batch_reduced(payload: event_pb2.EventPayload) -> str:
    event = payload.micro_batch_reduced
    return (
        f"out of memory in step {event.step}: at most {event.limit} {event.unit} a forward pass from here on, "
        f"not {event.previous_limit}; the steps stay the same"
    )


def _memory_measured(payload: event_pb2.EventPayload) -> str:
    event = payload.memory_measured
    return f"memory peaked at {event.peak_bytes:,} bytes; {event.predicted_bytes:,} were predicted"


def _export(payload: event_pb2.EventPayload) -> str:
    event = payload.export
    verdict = "accepted" if event.accepted else "REFUSED"
    return (
        f"export {event.format} {verdict}: logits differ by at most {event.max_logit_difference:.4g} "
        f"from the adapter's ({event.threshold:g} is the limit), and by {event.trained_max_logit_difference:.4g} "
        f"from those on the base as trained, on {event.num_prompts} prompts"
    )


def _artifact(payload: event_pb2.EventPayload) -> str:
    artifact = payload.artifact
    where = "collected" if artifact.collected else "written on the node"
    return f"artifact {artifact.name} {where} ({len(artifact.files)} files)"


def _memory_released(payload: event_pb2.EventPayload) -> str:
    released = payload.memory_released
    return f"memory released: {byte_count(released.freed_bytes)} in {released.seconds:.1f} s"


def _realized(payload: event_pb2.EventPayload) -> str:
    realized = payload.realized
    early = ", stopped early" if realized.stopped_early else ""
    return (
        f"trained {realized.num_steps} steps, {realized.total_examples} examples, {realized.total_tokens} tokens "
        f"in {duration(realized.training_seconds)}{early}"
    )


def _reachability(payload: event_pb2.EventPayload) -> str:
    change = payload.node_reachability
    return f"node {change.node} is {'reachable' if change.reachable else 'unreachable'}"


_BY_KIND: dict[int, Callable[[event_pb2.EventPayload], str]] = {
    event_pb2.EVENT_KIND_JOB_STATE: _job_state,
    event_pb2.EVENT_KIND_RUN_STATE: _run_state,
    event_pb2.EVENT_KIND_PHASE: _phase,
    event_pb2.EVENT_KIND_LOADING: _loading,
    event_pb2.EVENT_KIND_PLAN: _plan,
    event_pb2.EVENT_KIND_STEP: _step,
    event_pb2.EVENT_KIND_EVALUATION: _evaluation,
    event_pb2.EVENT_KIND_SAMPLE: _sample,
    event_pb2.EVENT_KIND_CHECKPOINT: _checkpoint,
    event_pb2.EVENT_KIND_RESUMED: _resumed,
    event_pb2.EVENT_KIND_ARTIFACT: _artifact,
    event_pb2.EVENT_KIND_WARNING: lambda payload: f"warning {payload.warning.code}: {payload.warning.message}",
    event_pb2.EVENT_KIND_LOG: lambda payload: f"{payload.log.level}: {payload.log.message}",
    event_pb2.EVENT_KIND_MEMORY_RELEASED: _memory_released,
    event_pb2.EVENT_KIND_REALIZED: _realized,
    event_pb2.EVENT_KIND_NODE_REACHABILITY: _reachability,
    event_pb2.EVENT_KIND_MICRO_BATCH_REDUCED: _micro_batch_reduced,
    event_pb2.EVENT_KIND_MEMORY_MEASURED: _memory_measured,
    event_pb2.EVENT_KIND_EXPORT: _export,
}
