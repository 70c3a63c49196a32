"""RunService: unpacks, asks the manager, packs. Decides nothing."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from grpc import aio

from gpu_service.api import wire
from gpu_service.domain.errors import refuse_user
from gpu_service.journal.failpoints import failpoint
from gpu_service.runs.admission import Admission
from gpu_service.runs.capabilities import CapabilityReader
from gpu_service.runs.inspection import Inspection
from gpu_service.runs.manager import RunManager
from gpu_service.runs.planning import Planning
from gpu_service.runs.probing import MemoryProber
from gpu_service.runs.signal import wait_for
from tunesmith.common.v1 import plan_pb2
from tunesmith.gpu.v1 import run_service_pb2, run_service_pb2_grpc

_DEFAULT_HEARTBEAT_SECONDS = 5.0
_STOP_MODES = {
    run_service_pb2.STOP_MODE_CANCEL: "cancel",
    run_service_pb2.STOP_MODE_CHECKPOINT: "checkpoint",
}

Context = aio.ServicerContext[Any, Any]


class RunServicer(run_service_pb2_grpc.RunServiceServicer):
    """Every method raises `Refusal`; the interceptor tells it."""

    def __init__(
        self,
        *,
        manager: RunManager,
        admission: Admission,
        planning: Planning,
        prober: MemoryProber,
        inspection: Inspection,
        capabilities: CapabilityReader,
        node_name: str,
        instance_id: str,
    ) -> None:
        self._manager = manager
        self._admission = admission
        self._planning = planning
        self._prober = prober
        self._inspection = inspection
        self._capabilities = capabilities
        self._node_name = node_name
        self._instance_id = instance_id

    async def GetCapabilities(  # noqa: N802 - the contract's name
        self, request: run_service_pb2.GetCapabilitiesRequest, context: Context
    ) -> run_service_pb2.GetCapabilitiesResponse:
        found = await self._capabilities.read()
        return wire.capabilities_to_wire(found, node_name=self._node_name, instance_id=self._instance_id)

    async def PlanRun(  # noqa: N802
        self, request: run_service_pb2.PlanRunRequest, context: Context
    ) -> run_service_pb2.PlanRunResponse:
        spec = wire.spec_from_wire(request.spec)
        device = await self._admission.planning_device()
        if request.probe_memory:
            if request.level != plan_pb2.PLAN_LEVEL_EXACT:
                raise refuse_user("INVALID_FIELD", "memory is probed at level EXACT only", field="probe_memory")
            problem = self._admission.problem()
            if problem is not None:
                raise problem
            plan = await self._prober.plan_and_probe(spec, device)
        elif request.level == plan_pb2.PLAN_LEVEL_EXACT:
            plan = await self._planning.exact(spec, device)
        else:
            plan = (await self._planning.check(spec, device)).to_json()
        return run_service_pb2.PlanRunResponse(plan=wire.plan_to_wire(plan))

    async def InspectDataset(  # noqa: N802
        self, request: run_service_pb2.InspectDatasetRequest, context: Context
    ) -> run_service_pb2.InspectDatasetResponse:
        found = await self._inspection.inspect(wire.inspect_from_wire(request))
        return wire.inspected_to_wire(found)

    async def StartRun(  # noqa: N802
        self, request: run_service_pb2.StartRunRequest, context: Context
    ) -> run_service_pb2.StartRunResponse:
        if not request.spec_digest:
            raise refuse_user("INVALID_FIELD", "spec_digest is missing", field="spec_digest")
        # A caller that goes away must not leave half an acceptance behind: asking again finds the run.
        run = await asyncio.shield(self._manager.start(wire.start_from_wire(request)))
        return run_service_pb2.StartRunResponse(run=wire.run_to_wire(run))

    async def GetRun(  # noqa: N802
        self, request: run_service_pb2.GetRunRequest, context: Context
    ) -> run_service_pb2.GetRunResponse:
        run = self._manager.get(wire.key_from_wire(request.key))
        return run_service_pb2.GetRunResponse(run=wire.run_to_wire(run))

    async def ListRuns(  # noqa: N802
        self, request: run_service_pb2.ListRunsRequest, context: Context
    ) -> run_service_pb2.ListRunsResponse:
        runs = self._manager.list_runs(request.installation_id)
        return run_service_pb2.ListRunsResponse(runs=[wire.run_to_wire(run) for run in runs])

    async def StopRun(  # noqa: N802
        self, request: run_service_pb2.StopRunRequest, context: Context
    ) -> run_service_pb2.StopRunResponse:
        mode = _STOP_MODES.get(request.mode)
        if mode is None:
            raise refuse_user("INVALID_FIELD", "mode must be CANCEL or CHECKPOINT", field="mode")
        grace_seconds = _seconds(request.grace_seconds, "grace_seconds")
        run = await self._manager.stop(wire.key_from_wire(request.key), mode, grace_seconds)
        return run_service_pb2.StopRunResponse(run=wire.run_to_wire(run))

    async def WatchRun(  # noqa: N802
        self, request: run_service_pb2.WatchRunRequest, context: Context
    ) -> AsyncIterator[run_service_pb2.WatchRunResponse]:
        run = self._manager.get(wire.key_from_wire(request.key))
        async with aclosing(run.follow(request.after_run_sequence)) as batches:
            async for records in batches:
                yield wire.records_to_wire(records)
                failpoint("watch-run.after-send")

    async def WatchNode(  # noqa: N802
        self, request: run_service_pb2.WatchNodeRequest, context: Context
    ) -> AsyncIterator[run_service_pb2.WatchNodeResponse]:
        heartbeat_seconds = _seconds(request.heartbeat_seconds, "heartbeat_seconds") or _DEFAULT_HEARTBEAT_SECONDS
        while True:
            changed = self._manager.changed.current()
            yield await self._report(request.installation_id)
            if self._manager.finished:
                return
            await wait_for(changed, heartbeat_seconds)

    async def _report(self, installation_id: str) -> run_service_pb2.WatchNodeResponse:
        devices = await self._admission.devices()
        return run_service_pb2.WatchNodeResponse(
            node_name=self._node_name,
            instance_id=self._instance_id,
            devices=[wire.device_to_wire(device) for device in devices],
            runs=[wire.run_to_wire(run) for run in self._manager.list_runs(installation_id)],
            accepting=await self._manager.accepting(),
            draining=self._manager.draining,
            resident_base_model=self._manager.resident_base_model,
        )

    async def ReleaseRun(  # noqa: N802
        self, request: run_service_pb2.ReleaseRunRequest, context: Context
    ) -> run_service_pb2.ReleaseRunResponse:
        freed_bytes = await asyncio.shield(self._manager.release(wire.key_from_wire(request.key)))
        return run_service_pb2.ReleaseRunResponse(freed_bytes=freed_bytes)


def _seconds(value: float, field: str) -> float:
    if not math.isfinite(value) or value < 0:
        raise refuse_user("INVALID_FIELD", f"{field} must be a number of seconds from 0", field=field)
    return value
