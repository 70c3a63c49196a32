"""What a question to a job or a base is made of, and an answer in one piece; for both clients. Makes no call."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict

from tunesmith.common.v1 import generation_pb2
from tunesmith.control.v1 import inference_service_pb2

# A user's message alone, or a conversation.
Messages = str | Iterable[generation_pb2.ChatMessage]


class SamplingOptions(TypedDict, total=False):
    """How tokens are chosen; what is left out has the service's default (see `tunesmith.common.v1.Sampling`)."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A whole answer. `finish_reason` is STOP, STOP_STRING or LENGTH; `node` answered.

    `adapter` is `adapter`, or the checkpoint whose weights answered; empty for a base.
    """

    text: str
    finish_reason: str
    statistics: generation_pb2.GenerationStatistics
    node: str
    adapter: str = ""


def generate_request(
    messages: Messages, *, job_id: str, base_model: str, base_only: bool, sampling: SamplingOptions
) -> inference_service_pb2.GenerateRequest:
    """The request. ValueError unless exactly one of `job_id` and `base_model` is given."""
    if bool(job_id) == bool(base_model):
        raise ValueError("give a job_id or a base_model, one of the two")
    turns = [generation_pb2.ChatMessage(role="user", content=messages)] if isinstance(messages, str) else messages
    request = inference_service_pb2.GenerateRequest(
        base_only=base_only, messages=turns, sampling=generation_pb2.Sampling(**sampling)
    )
    if job_id:
        request.job_id = job_id
    else:
        request.base_model = base_model
    return request


def ignore_text(text: str) -> None:
    """For callers who wait for the whole."""


class AnswerBuilder:
    """Joins the responses of one answer."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._node = ""
        self._adapter = ""
        self._last = generation_pb2.GeneratedPart()

    def add(self, response: inference_service_pb2.GenerateResponse) -> None:
        """Takes the next response."""
        self._texts.append(response.part.text)
        self._node = self._node or response.node
        self._adapter = self._adapter or response.adapter
        self._last = response.part

    def answer(self) -> Answer:
        """The answer, once the stream has ended."""
        return Answer(
            text="".join(self._texts),
            finish_reason=finish_reason_name(self._last),
            statistics=self._last.statistics,
            node=self._node,
            adapter=self._adapter,
        )


def finish_reason_name(part: generation_pb2.GeneratedPart) -> str:
    """`STOP` for FINISH_REASON_STOP; the number of one that this version does not know."""
    number = part.finish_reason
    if number not in generation_pb2.FinishReason.values():
        return str(int(number))
    return generation_pb2.FinishReason.Name(number).removeprefix("FINISH_REASON_")
