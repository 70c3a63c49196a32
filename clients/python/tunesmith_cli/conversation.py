"""One side of a chat: who answers, and what was said so far. Prints nothing."""

from collections.abc import Callable

from tunesmith.common.v1 import generation_pb2
from tunesmith_client import Answer, Client, SamplingOptions


class Side:
    """A job's adapter, a job's base, or a base model, with a conversation of its own."""

    def __init__(
        self,
        client: Client,
        *,
        title: str,
        source: str,
        job_id: str = "",
        base_model: str = "",
        system: str = "",
        sampling: SamplingOptions,
    ) -> None:
        """`source` is `adapter` or `base`; a job's base has its `job_id`."""
        self.title = title
        self.source = source
        self._client = client
        self._job_id = job_id
        self._base_model = base_model
        self._sampling = sampling
        self._system = system
        self.forget()

    def forget(self) -> None:
        """Begin a conversation anew."""
        self._turns = [generation_pb2.ChatMessage(role="system", content=self._system)] if self._system else []

    @property
    def turns(self) -> tuple[generation_pb2.ChatMessage, ...]:
        """What was said so far."""
        return tuple(self._turns)

    def return_to(self, turns: tuple[generation_pb2.ChatMessage, ...]) -> None:
        """Forget what was said since."""
        self._turns = list(turns)

    def ask(self, prompt: str, on_text: Callable[[str], object]) -> Answer:
        """The answer; `on_text` is given its text as it comes. An answer that breaks off leaves no turn."""
        question = generation_pb2.ChatMessage(role="user", content=prompt)
        answer = self._client.inference.answer(
            [*self._turns, question],
            job_id=self._job_id,
            base_model=self._base_model,
            base_only=self.source == "base" and bool(self._job_id),
            on_text=on_text,
            **self._sampling,
        )
        self._turns += [question, generation_pb2.ChatMessage(role="assistant", content=answer.text)]
        return answer
