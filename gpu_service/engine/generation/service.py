"""Carries out one generation, and is its outermost boundary: base from the shelf or loaded, adapter on, tokens, adapter
off, base back on the shelf.

Leaves the process as a run expects it: no adapter on the base, every random state as before. After a failure that is no
refusal the engine ends, because what is left in it is unknown. Writes no journal.
"""

from __future__ import annotations

import hashlib
import logging
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from gpu_service.catalog import families, methods, quantization
from gpu_service.domain.device import Device
from gpu_service.domain.errors import Fault, Refusal, refuse_user
from gpu_service.domain.quantizer import choose_quantizer
from gpu_service.domain.trainer import FAST
from gpu_service.engine import devices
from gpu_service.engine.failures import LoadFailure, from_exception, library_versions
from gpu_service.engine.generation import adapter, order
from gpu_service.engine.generation.decoding import generate
from gpu_service.engine.generation.order import GenerationOrder, GenerationRequest
from gpu_service.engine.generation.prompt import Prompt, render
from gpu_service.engine.generation.sampling import LogitsNotFinite, TokenChooser
from gpu_service.engine.generation.text import StopFinder, TokenText
from gpu_service.engine.generation.voice import Voice
from gpu_service.engine.loading import BASE_STAGES, Loaded, LoadRequest, load
from gpu_service.engine.loading.work import BaseKey
from gpu_service.engine.precision import DTYPES
from gpu_service.engine.reporter import Notify
from gpu_service.engine.resident import BaseShelf, ResidentBase, held_bytes
from gpu_service.engine.stopping import StopRequested, StopSwitch
from gpu_service.engine.training import random_state
from gpu_service.engine.training.generate import stop_token_ids
from gpu_service.engine.training.modes import measuring
from tunesmith.common.v1 import errors_pb2, plan_pb2, training_spec_pb2

_LOG = logging.getLogger(__name__)
_MAX_MESSAGE_CHARACTERS = 1000


def carry_out(asked: GenerationOrder, *, shelf: BaseShelf, notify: Notify) -> bool:
    """One generation from its request file to its last message. True when the engine must end after it."""
    voice = Voice(asked, notify)
    failure: Refusal | None = None
    ends_engine = False
    try:
        asked.switch.check()
        generation = _Generation(order.read(asked.request_file), asked.switch, voice, shelf)
        with random_state.kept(generation.device):
            generation.run()
    except StopRequested:
        voice.stopped(resident=shelf.describe())
    except Refusal as refusal:
        failure = refusal
    except LogitsNotFinite as error:
        failure = refuse_user("GENERATION", str(error))
    except LoadFailure as error:
        _LOG.warning("generation failed while loading", exc_info=True)
        failure, ends_engine = _as_refusal(error.failure), True
    except Exception as error:  # noqa: BLE001 - a generation's outermost boundary: typed, told, and the engine ends
        _LOG.exception("generation failed")
        failure, ends_engine = _as_refusal(from_exception(error, reason="GENERATION", fault="PLATFORM")), True
    if failure is not None:
        voice.fail(failure, ends_engine=ends_engine, resident={} if ends_engine else shelf.describe())
    return ends_engine


def _as_refusal(failure: errors_pb2.Failure) -> Refusal:
    """GENERATION whatever the cause; a cause that has a reason of its own stands in the details."""
    reason = errors_pb2.ErrorReason.Name(failure.reason).removeprefix("ERROR_REASON_")
    return Refusal(
        "GENERATION",
        Fault(errors_pb2.Fault.Name(failure.fault).removeprefix("FAULT_")),
        failure.message[:_MAX_MESSAGE_CHARACTERS],
        stage=failure.stage,
        details={} if reason == "GENERATION" else {"cause": reason},
        exception_type=failure.exception_type,
        file=failure.file,
    )


@dataclass(kw_only=True)
class _QuietReport:
    """Loading tells nobody of its stages here; a failure names its own."""

    loading_stage: str = ""

    def emit(self, message: object) -> None:
        """Nothing: there is no journal."""


class _Generation:
    """Values of one generation on their way through its steps."""

    def __init__(self, request: GenerationRequest, switch: StopSwitch, voice: Voice, shelf: BaseShelf) -> None:
        self._request = request
        self._switch = switch
        self._voice = voice
        self._shelf = shelf
        self._device = devices.select(request.device)
        self._device.make_current()
        self._compute_dtype = DTYPES[request.compute_dtype]
        self._method = import_module(methods.REGISTRY[request.training_type].builder)

    @property
    def device(self) -> torch.device:
        return self._device.torch_device

    def run(self) -> None:
        """From the base to the last message. Raises StopRequested, Refusal, LoadFailure, and what the libraries do."""
        key = self._key()
        held = self._shelf.describe()
        resident = self._shelf.take(key)
        if held and resident is None:
            self._device.give_back()
        loaded = self._load(resident)
        is_warm = resident is not None and resident.model is not None
        base = ResidentBase(
            key=key,
            base_model=self._request.base_model,
            model=loaded.base,
            stored_dtype=loaded.stored_dtype,
            # Not what it was: another model of its tensors may hold some in other types.
            num_bytes=held_bytes(loaded.base),
        )
        try:
            finish = self._answer(base.model, loaded.tokenizer)
        except (StopRequested, Refusal, LogitsNotFinite):
            # The base is clean: these come from between two passes, and the adapter is off.
            self._shelf.put(base)
            raise
        self._shelf.put(base)
        text, reason, num_prompt_tokens = finish
        self._voice.finish(
            text,
            reason,
            num_prompt_tokens=num_prompt_tokens,
            warm=is_warm,
            resident=self._shelf.describe(),
        )

    def _key(self) -> BaseKey:
        """The same as a run's on this base, so that each finds what the other left."""
        request = self._request
        return BaseKey(
            weights_digest=request.weights_digest,
            config_digest=hashlib.sha256((request.model_directory / "config.json").read_bytes()).hexdigest(),
            model_directory=request.model_directory,
            quantization=request.quantization,
            double_quantization=request.double_quantization,
            compute_dtype=request.compute_dtype,
            base_dtype=str(self._method.base_dtype(self._compute_dtype)),
            device=str(self._device.torch_device),
        )

    def _load(self, resident: ResidentBase | None) -> Loaded:
        request = self._request
        loaded = Loaded(stored_dtype=None if resident is None else resident.stored_dtype)
        settings = training_spec_pb2.Quantization(
            method=request.quantization,
            double_quantization=request.double_quantization,
            compute_dtype=request.compute_dtype,
        )
        load(
            LoadRequest(
                model_directory=request.model_directory,
                base_model=request.base_model,
                weights_digest=request.weights_digest,
                plan=plan_pb2.Plan(resolved=training_spec_pb2.Hyperparameters(quantization=settings)),
                family=import_module(families.REGISTRY[request.model_type].builder),
                quantization=import_module(quantization.REGISTRY[request.quantization].builder),
                method=self._method,
                compute_dtype=self._compute_dtype,
                device=self._device.torch_device,
                cache_directory=request.cache_directory,
                quantizer=choose_quantizer(
                    request.quantization,
                    compute_dtype=request.compute_dtype,
                    trainer=FAST if self._has_kernels() else "",
                    device=Device(type=request.device.type),
                    versions=library_versions(),
                ),
                resident=resident,
                tokenizers=self._shelf.tokenizers,
            ),
            loaded,
            switch=self._switch,
            reporter=_QuietReport(),
            stages=BASE_STAGES,
        )
        return loaded

    def _has_kernels(self) -> bool:
        """Whether this engine's own code can quantize here; else the library does, as where it trains without it."""
        described = Device.from_json(self._device.describe())
        return described.has_kernels and not self._shelf.find_kernel_problem(self._device.torch_device)

    def _answer(self, base: Any, tokenizer: Any) -> tuple[str, str, int]:
        """Last text, finish reason and number of prompt tokens. The base is as before when it returns or refuses."""
        request = self._request
        prompt = render(tokenizer, request.messages, chat_template=request.chat_template)
        room = self._room(base, prompt)
        stop_ids = {*stop_token_ids(request.model_directory, base, tokenizer), *prompt.end_token_ids}
        model = base
        if request.adapter_directory is not None:
            base.name_or_path = request.base_model
            model = adapter.attach(base, request.adapter_directory, request.lora)
        try:
            with measuring(model), self._autocast():
                text, reason = self._stream(model, tokenizer, prompt, stop_ids, room)
        finally:
            if model is not base:
                self._method.detach(model)
        return text, reason, len(prompt.token_ids)

    def _room(self, base: Any, prompt: Prompt) -> int:
        """Tokens that may be made at most. Raises `Refusal` PROMPT_TOO_LONG."""
        limit: int = base.config.get_text_config().max_position_embeddings
        if len(prompt.token_ids) >= limit:
            raise refuse_user(
                "PROMPT_TOO_LONG",
                f"the prompt has {len(prompt.token_ids)} tokens, and the model has positions for {limit}",
                field="messages",
                num_prompt_tokens=len(prompt.token_ids),
                max_tokens=limit,
            )
        return min(self._request.sampling.max_new_tokens, limit - len(prompt.token_ids))

    def _autocast(self) -> Any:
        """Products in the type that training makes them in."""
        if self._compute_dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self._device.torch_device.type, self._compute_dtype)

    def _stream(self, model: Any, tokenizer: Any, prompt: Prompt, stop_ids: set[int], room: int) -> tuple[str, str]:
        """Say every part but the last; gives that one's text and the finish reason."""
        sampling = self._request.sampling
        text = TokenText(lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
        # The template's own end ends the turn as its token would; a user's stop string is told apart.
        finder = StopFinder([*sampling.stop, prompt.end_text])
        tokens = generate(
            model,
            prompt.token_ids,
            device=self._device.torch_device,
            choose=TokenChooser(sampling).choose,
            before_each=self._switch.check,
        )
        for token in tokens:
            if token in stop_ids:
                return finder.add(text.finish()) + finder.finish(), "STOP"
            self._voice.count_token()
            certain = finder.add(text.add(token))
            if finder.found is not None:
                return certain, "STOP" if finder.found == prompt.end_text else "STOP_STRING"
            if self._voice.num_tokens >= room:
                certain += finder.add(text.finish())
                if finder.found is not None:
                    return certain, "STOP" if finder.found == prompt.end_text else "STOP_STRING"
                return certain + finder.finish(), "LENGTH"
            self._voice.say(certain)
        raise AssertionError("tokens never end by themselves")
