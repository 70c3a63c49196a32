"""Who goes where next, and why the others wait."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from control_service.domain.job import WaitReason
from control_service.domain.node import Device, Node, NodeCapabilities, NodeReport, NodeState, NodeView
from control_service.domain.queue_policy import QueuedJob, decide
from tests.fakes.control_jobs import NOW, SPEC, make_job, make_node_model


def _job(number: int, *, base: str = "org/base", priority: int = 0, bound: str = "", **changes: object) -> QueuedJob:
    spec = replace(SPEC, base_model=base)
    return QueuedJob.of(make_job(job_id=f"{number:026d}", spec=spec, priority=priority, **changes), bound_node=bound)


def _node(
    name: str,
    *models: str,
    state: NodeState = NodeState.REACHABLE,
    draining: bool = False,
    accepting: bool = True,
    resident: str = "",
    num_devices: int = 1,
) -> NodeView:
    device = Device(index=0, type="cuda", name="d", total_memory_bytes=1, free_memory_bytes=1)
    return NodeView(
        node=Node(name=name, address="x:1", draining=draining, create_time=NOW),
        state=state,
        report=NodeReport(
            node_name=name,
            instance_id="1",
            devices=(device,) * num_devices,
            accepting=accepting,
            resident_base_model=resident,
        ),
        capabilities=NodeCapabilities(node_name=name, instance_id="1", models=tuple(map(make_node_model, models))),
    )


def _assigned(queue: list[QueuedJob], nodes: list[NodeView], **on_node: list[str]) -> list[tuple[int, str]]:
    decision = decide(queue, nodes, jobs_on_node=on_node, now=NOW)
    return [(int(job_id), node) for job_id, node in decision.assignments]


def _reasons(queue: list[QueuedJob], nodes: list[NodeView], **on_node: list[str]) -> list[tuple[int, WaitReason]]:
    places = decide(queue, nodes, jobs_on_node=on_node, now=NOW).places
    return [(places[queued.job_id].position, places[queued.job_id].reason) for queued in queue]


def test_first_in_first_out_within_a_priority() -> None:
    queue = [_job(1), _job(2), _job(3, priority=1)]
    assert _assigned(queue, [_node("a", "org/base")]) == [(3, "a")]
    # The free node goes to the first; nothing but the queue keeps the others.
    assert _reasons(queue, [_node("a", "org/base")]) == [
        (2, WaitReason.QUEUE),
        (3, WaitReason.QUEUE),
        (1, WaitReason.UNSPECIFIED),
    ]


def test_a_free_node_with_the_resident_base_is_preferred_and_never_waited_for() -> None:
    nodes = [_node("a", "org/base"), _node("b", "org/base", resident="org/base")]
    assert _assigned([_job(1), _job(2)], nodes) == [(1, "b"), (2, "a")]
    assert _assigned([_job(1)], nodes, b=["x"]) == [(1, "a")]


def test_one_run_for_each_device() -> None:
    node = _node("a", "org/base", num_devices=2)
    assert _assigned([_job(1), _job(2), _job(3)], [node]) == [(1, "a"), (2, "a")]
    assert _assigned([_job(1), _job(2)], [node], a=["x"]) == [(1, "a")]
    assert _assigned([_job(1)], [_node("a", "org/base", accepting=False)]) == []


def test_a_quarantined_device_gets_no_job() -> None:
    node = _node("a", "org/base", num_devices=2)
    assert node.report is not None
    bad, good = replace(node.report.devices[0], quarantine_reason="x"), node.report.devices[1]
    nodes = [replace(node, report=replace(node.report, devices=(bad, good)))]
    assert _assigned([_job(1), _job(2)], nodes) == [(1, "a")]
    assert _assigned([_job(1)], [replace(node, report=replace(node.report, devices=(bad,)))]) == []


def test_a_job_that_must_wait_does_not_hold_up_one_that_need_not() -> None:
    queue = [_job(1, base="org/absent"), _job(2, not_before=NOW + timedelta(seconds=5)), _job(3)]
    assert _assigned(queue, [_node("a", "org/base")]) == [(3, "a")]
    assert _reasons(queue, [_node("a", "org/base")]) == [
        (1, WaitReason.NO_MODEL),
        (2, WaitReason.BACK_OFF),
        (3, WaitReason.UNSPECIFIED),
    ]


def test_a_back_off_that_another_clock_wrote_is_over() -> None:
    assert _reasons([_job(1, not_before=NOW + timedelta(seconds=59))], [_node("a", "org/base")]) == [
        (1, WaitReason.BACK_OFF)
    ]
    # No back-off is an hour long: the clock has been set back since.
    assert _assigned([_job(1, not_before=NOW + timedelta(hours=1))], [_node("a", "org/base")]) == [(1, "a")]


def test_a_node_of_another_installation_is_told_of() -> None:
    foreign = replace(_node("a", "org/base", state=NodeState.UNREACHABLE), problem="WRONG_INSTALLATION: not ours")
    place = decide([_job(1)], [foreign], jobs_on_node={}, now=NOW).places[_job(1).job_id]
    assert place.reason is WaitReason.NO_NODE
    assert "node a: WRONG_INSTALLATION" in place.message


def test_why_a_job_waits() -> None:
    one = [_job(1)]
    assert _reasons(one, []) == [(1, WaitReason.NO_NODE)]
    assert _reasons(one, [_node("a", "org/base", state=NodeState.UNREACHABLE)]) == [(1, WaitReason.NO_NODE)]
    assert _reasons(one, [_node("a")]) == [(1, WaitReason.NO_MODEL)]
    assert _reasons(one, [_node("a", "org/base", draining=True)]) == [(1, WaitReason.DRAINING)]
    assert _reasons(one, [_node("a", "org/base")], a=["x"]) == [(1, WaitReason.NODE_BUSY)]


def test_a_node_that_is_too_small_for_a_job_does_not_get_it() -> None:
    small = replace(_node("a", "org/base"), unfit_jobs=frozenset({_job(1).job_id}))
    assert _reasons([_job(1)], [small]) == [(1, WaitReason.NO_NODE)]
    assert _assigned([_job(1)], [small, _node("b", "org/base")]) == [(1, "b")]
    assert _assigned([_job(2)], [small]) == [(2, "a")]


def test_pinned_weights_and_bound_checkpoints_choose_the_node() -> None:
    nodes = [_node("a", "org/base"), _node("b", "org/base")]
    assert _assigned([_job(1, bound="b")], nodes) == [(1, "b")]
    assert _reasons([_job(1, bound="b")], [nodes[0], replace(nodes[1], state=NodeState.UNREACHABLE)]) == [
        (1, WaitReason.NO_NODE)
    ]
    assert _reasons([_job(1, weights_digest="w2")], nodes) == [(1, WaitReason.NO_MODEL)]


def test_a_job_that_moves_comes_after_the_queue_and_never_to_the_node_it_lost() -> None:
    moving = replace(_job(0), lost_node="a")
    nodes = [replace(_node("a", "org/base"), state=NodeState.UNREACHABLE), _node("b", "org/base")]
    assert _assigned([moving], nodes) == [(0, "b")]
    decision = decide([moving, _job(1)], [nodes[1]], jobs_on_node={}, now=NOW)
    assert [int(job_id) for job_id, _ in decision.assignments] == [1]
    assert list(decision.places) == [_job(1).job_id]


def test_a_job_whose_node_is_back_before_it_was_given_away_stays_there() -> None:
    moving = replace(_job(0), lost_node="a")
    lost, other = replace(_node("a", "org/base"), state=NodeState.UNREACHABLE), _node("b", "org/base")
    assert _assigned([moving], [replace(lost, state=NodeState.REACHABLE), other]) == []
    # It speaks, and is asked who it is; or control has just begun, and nothing was heard of it yet.
    speaks = replace(lost, state=NodeState.CONNECTING, last_heard_time=NOW)
    assert _assigned([moving], [speaks, other]) == []
    assert _assigned([moving], [replace(speaks, last_heard_time=None), other]) == [(0, "b")]


def test_jobs_before_it_that_want_other_nodes_are_not_why_a_job_waits() -> None:
    nodes = [_node("a", "org/base"), _node("b", "org/other")]
    queue = [_job(1), _job(2, base="org/other"), _job(3)]
    assert _reasons(queue, nodes, a=["x"], b=["y"]) == [
        (1, WaitReason.NODE_BUSY),
        (2, WaitReason.NODE_BUSY),
        (3, WaitReason.QUEUE),
    ]


def test_a_job_says_why_nodes_that_have_its_base_cannot_train_it() -> None:
    nodes = [replace(_node("a", "org/base"), problem="transformers 4.57.2 is known to be bad"), _node("b", "org/base")]
    job = _job(1, weights_digest="w2")
    place = decide([job], nodes, jobs_on_node={}, now=NOW).places[job.job_id]
    assert place.reason is WaitReason.NO_MODEL
    assert "node a: transformers 4.57.2 is known to be bad" in place.message
    assert "node b: it has other weights" in place.message
