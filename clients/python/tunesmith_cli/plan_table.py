"""A plan as tables: what each dataset gives, and what the run will be. Shows; computes nothing but sums for display."""

from collections.abc import Mapping

from tunesmith.common.v1 import plan_pb2
from tunesmith_cli.output import Output
from tunesmith_cli.text import byte_count


def show_plan(out: Output, plan: plan_pb2.Plan, node: str, *, dataset_names: Mapping[int, str]) -> None:
    """Prints the plan for people. A dataset that `dataset_names` lacks is shown by its id."""
    # At level CHECK no token is counted: a dash there, where a number would be a lie.
    is_counted = plan.level == plan_pb2.PLAN_LEVEL_EXACT
    rows = [
        (
            source.trait_type,
            dataset_names.get(source.dataset_id, source.dataset_id),
            "held out" if source.held_out else f"{source.share * 100:.1f} %",
            source.num_available,
            source.num_examples,
            source.run_examples if is_counted and not source.held_out else "-",
            f"{source.num_tokens if source.held_out else source.run_tokens:,}" if is_counted else "-",
            f"{source.num_target_tokens if source.held_out else source.run_target_tokens:,}" if is_counted else "-",
            source.num_truncated if is_counted else "-",
            ", ".join(f"{count} {reason}" for reason, count in sorted(source.dropped.items())),
        )
        for source in plan.datasets
    ]
    columns = ("TRAIT", "DATASET", "SHARE", "AVAILABLE", "PER EPOCH", "IN RUN", "TOKENS", "TARGETS", "CUT", "DROPPED")
    out.rows(columns, rows, title="Plan")
    method = plan.resolved.quantization.method
    lines = [
        ("steps", f"{plan.num_steps:,} ({plan.num_epochs:.2f} epochs of {plan.examples_per_epoch:,} examples)"),
        ("tokens", _tokens(plan) if is_counted else "not counted: --check reads no data"),
        ("training", f"{plan.training_type}, base held in {method}" if method else plan.training_type),
        ("layers", f"{plan.num_covered_linears} of {plan.num_linears} linear layers are covered"),
        ("trainable", f"{plan.num_trainable_parameters:,} of {plan.num_parameters:,} parameters"),
        ("memory", f"{byte_count(plan.memory.total_bytes)} estimated, on {plan.device or 'an unnamed device'}"),
        ("", _memory_parts(plan.memory)),
        ("host memory", f"{byte_count(plan.memory.host_bytes)} locked" if plan.memory.host_bytes else ""),
        ("peak", _peak(plan)),
        ("node", node),
        ("data digest", plan.data_digest),
    ]
    for name, value in lines:
        if value:
            out.line(f"{name:<12} {value}")
    for warning in plan.warnings:
        out.line(f"warning: {warning}")


_MEMORY_PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "overhead")
_BASES = {"analytic": "by arithmetic", "calibrated": "by arithmetic and what this node measured"}


def _memory_parts(memory: plan_pb2.MemoryEstimate) -> str:
    sizes = [(name, getattr(memory, f"{name}_bytes")) for name in _MEMORY_PARTS]
    return ", ".join(f"{name} {byte_count(size)}" for name, size in sizes if size)


def _peak(plan: plan_pb2.Plan) -> str:
    """What the STEP events' peak is expected to come to, and what a probe saw."""
    if not plan.memory.peak_bytes:
        return ""
    predicted = f"{byte_count(plan.memory.peak_bytes)} predicted, {_BASES.get(plan.memory.basis, plan.memory.basis)}"
    if not plan.HasField("memory_probe"):
        return predicted
    probe = plan.memory_probe
    return (
        f"{predicted}; {byte_count(probe.peak_bytes)} measured on a step of {probe.step_tokens:,} tokens "
        f"(longest example {probe.longest_tokens:,}) in {probe.seconds:.0f} s"
    )


def _tokens(plan: plan_pb2.Plan) -> str:
    return f"{plan.total_tokens:,} in all steps, of which {plan.total_target_tokens:,} carry loss"
