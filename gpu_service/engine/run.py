"""One run from its first event to what comes before its last: plan, load, evaluate, train, save.

A straight line of phases over a resident base; an export only loads and saves. Ends by returning, or by raising
StopRequested or RunFailure; the last events and the memory are the caller's (`ending`). Contains no training step and
no loading stage.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from gpu_service.catalog import families, methods, quantization, templates
from gpu_service.domain.defaults import LOW
from gpu_service.domain.planned_data import PlannedData, PlannedDataDamaged
from gpu_service.domain.trainer import FAST
from gpu_service.engine import head_start, libraries, planning
from gpu_service.engine.devices import Device
from gpu_service.engine.failures import RunFailure, from_exception
from gpu_service.engine.lean import choice
from gpu_service.engine.lean.builders import Builders
from gpu_service.engine.loading import Loaded, LoadRequest, load
from gpu_service.engine.loading.work import BaseKey
from gpu_service.engine.precision import DTYPES
from gpu_service.engine.reporter import Reporter
from gpu_service.engine.request import RunRequest
from gpu_service.engine.resident import BaseShelf, ResidentBase
from gpu_service.engine.session import Session
from gpu_service.engine.spare_planner import SparePlanner
from gpu_service.engine.stopping import StopSwitch
from gpu_service.engine.training import random_state
from tunesmith.common.v1 import plan_pb2

KERNELS_NOT_COMPILED = "kernels-not-compiled"


@dataclass(kw_only=True)
class Run:
    """One run in the making. `method`, `key` and `loaded` are there as soon as loading began, for whoever cleans up."""

    request: RunRequest
    device: Device
    shelf: BaseShelf
    switch: StopSwitch
    reporter: Reporter
    planner_command: Sequence[str]
    spare_planner: SparePlanner | None = None
    # What was begun while the engine imported its libraries; a plan is given up where it is not the run's.
    begun_plan: planning.Begun | None = None
    begun_head_start: threading.Thread | None = None
    make_session: Callable[..., Session] = Session
    key: BaseKey | None = None
    method: Any = None
    loaded: Loaded | None = None
    resident: ResidentBase | None = None

    def execute(self) -> None:
        """The whole run. Raises StopRequested, RunFailure, and what nothing here understands."""
        self.device.make_current()
        if planning.needs_planner(self.request):
            self._train()
        else:
            self._export()

    def drop_begun(self) -> None:
        """What was begun for the run and not used is ended, or waited for."""
        begun, self.begun_plan = self.begun_plan, None
        if begun is not None:
            begun.end()
        if self.begun_head_start is not None:
            self.begun_head_start.join()

    def _export(self) -> None:
        """No data, no optimizer: what an earlier job left is loaded and written in another form."""
        plan = planning.check(self.request, device=self.device.describe())
        self.reporter.emit(plan)
        self.switch.check()
        loaded, _ = self._load(plan)
        # Writing is the libraries' work, who are there by now.
        from gpu_service.engine import export_job

        export_job.export(request=self.request, plan=plan, loaded=loaded, switch=self.switch, reporter=self.reporter)

    def _train(self) -> None:
        self.reporter.enter_phase("PLANNING")
        # What the device has free, before anything is put there.
        device = self.device.describe()
        with head_start.preparing(self.device.torch_device, self.begun_head_start):
            plan_directory = self._plan(device)
            if self.shelf.kernel_problem is None and _open(plan_directory)[1].resolved.trainer == FAST:
                # Before a weight is read: a plan for kernels that cannot be compiled is made anew without them.
                problem = self.shelf.find_kernel_problem(self.device.torch_device)
                plan_directory = self._plan(device) if problem else plan_directory
            session = self.open_session(plan_directory)
        session.train()

    def _plan(self, device: dict[str, Any]) -> Path:
        problem = self.shelf.kernel_problem or ""
        if problem:
            self.reporter.warn(KERNELS_NOT_COMPILED, f"no kernels of the fast path can be compiled here: {problem}")
        wanted = {**device, "kernel_problem": problem}
        begun, self.begun_plan = self.begun_plan, None
        if begun is not None and not begun.is_for(wanted):
            begun.end()
            begun = None
        if begun is None:
            begun = planning.begin(self.request, command=self.planner_command, device=wanted, spare=self.spare_planner)
        return planning.finish(begun, switch=self.switch, reporter=self.reporter)

    def open_session(self, plan_directory: Path) -> Session:
        """The planned data with the loaded model, ready to train. Raises StopRequested, RunFailure."""
        data, plan = _open(plan_directory)
        self.reporter.emit(plan)
        self.switch.check()
        loaded, method = self._load(plan)
        return self.make_session(
            request=self.request,
            plan=plan,
            data=data,
            loaded=loaded,
            method=method,
            device=self.device,
            switch=self.switch,
            reporter=self.reporter,
        )

    def _load(self, plan: plan_pb2.Plan) -> tuple[Loaded, Any]:
        self.reporter.enter_phase("LOADING")
        is_lean = choice.is_lean(self.request, plan)
        made_with = choice.builders(plan) if is_lean else self._import_builders(plan)
        method = self.method = made_with.method
        settings = plan.resolved.quantization
        compute_dtype = DTYPES[settings.compute_dtype]
        self.key = BaseKey(
            weights_digest=self.request.weights_digest,
            config_digest=_digest(self.request.model_directory / "config.json"),
            model_directory=self.request.model_directory,
            quantization=settings.method,
            double_quantization=settings.double_quantization,
            compute_dtype=settings.compute_dtype,
            base_dtype=str(method.base_dtype(compute_dtype)),
            device=str(self.device.torch_device),
        )
        # What is taken off the shelf is this run's until it is put back, clean.
        held = self.shelf.describe()
        self.resident = self.shelf.take(self.key)
        if held and self.resident is None:
            # Another base was dropped, and its memory is wanted now.
            self.device.give_back()
        random_state.seed_all(plan.resolved.seed)
        # Known before loading ends, so that a run that is stopped on the way can be cleaned up.
        loaded = self.loaded = Loaded()
        if self.resident is not None:
            loaded.stored_dtype = self.resident.stored_dtype
        asked = LoadRequest(
            model_directory=self.request.model_directory,
            base_model=self.request.spec.base_model,
            weights_digest=self.request.weights_digest,
            plan=plan,
            family=made_with.family,
            quantization=made_with.quantization,
            method=method,
            is_lean=is_lean,
            compute_dtype=compute_dtype,
            device=self.device.torch_device,
            cache_directory=self.request.cache_directory,
            quantizer=plan.quantizer,
            resident=self.resident,
            start=self.request.start,
            pace=self.switch,
            tokenizers=self.shelf.tokenizers,
        )
        if is_lean and not choice.fits(asked):
            made_with = self._import_builders(plan)
            method = self.method = made_with.method
            asked = replace(asked, is_lean=False, **vars(made_with))
        load(asked, loaded, switch=self.switch, reporter=self.reporter)
        if plan.resolved.chat_template:
            loaded.chat_template = templates.REGISTRY[plan.resolved.chat_template].read_text()
        if loaded.tokenizer is not None:
            loaded.need_tokenizer()
        return loaded, method

    def _import_builders(self, plan: plan_pb2.Plan) -> Builders:
        """The catalog's, who work with the libraries. Raises StopRequested."""
        libraries.need(self.switch.check)
        return Builders(
            family=import_module(families.REGISTRY[plan.model_type].builder),
            quantization=import_module(quantization.REGISTRY[plan.resolved.quantization.method].builder),
            method=import_module(_builder_of(plan)),
        )


def _builder_of(plan: plan_pb2.Plan) -> str:
    """Name of the module that holds and attaches what the plan trains."""
    entry = methods.REGISTRY[plan.training_type]
    return entry.low_memory_builder if plan.resolved.full_memory == LOW else entry.builder


def _digest(path: Path) -> str:
    """SHA-256 of a file; empty for none, which the stage that reads it will tell."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _open(plan_directory: Path) -> tuple[PlannedData, plan_pb2.Plan]:
    try:
        data = PlannedData.open(plan_directory)
        return data, json_format.ParseDict(dict(data.plan), plan_pb2.Plan())
    except (PlannedDataDamaged, json_format.ParseError) as error:
        raise RunFailure(from_exception(error, reason="PLANNING", fault="PLATFORM", stage="PLANNING")) from error
