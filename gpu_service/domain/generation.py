"""What is asked of a base or an adapter, with every default applied and every range checked. Renders and loads nothing.

The defaults and ranges are those that `generation.proto` declares; a contract test holds the two together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gpu_service.catalog import templates
from gpu_service.domain.errors import refuse_user
from gpu_service.domain.spec import Lora, Quantization

DEFAULT_MAX_NEW_TOKENS = 256
ROLES = ("system", "user", "assistant", "tool")
# Field, smallest, largest legal number; 0 itself is no legal top_p.
RANGES: Mapping[str, tuple[float, float]] = {
    "max_new_tokens": (1, 131072),
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (0, 1_000_000),
    "seed": (0, 2**63 - 1),
}
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 takes the most likely one, `top_k` 0 draws from all."""

    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises `Refusal` INVALID_FIELD naming the field."""
        for name, (smallest, largest) in RANGES.items():
            value = getattr(self, name)
            # Not a number fails every comparison.
            if not smallest <= value <= largest or (name == "top_p" and value == 0):
                field = f"sampling.{name}"
                raise refuse_user("INVALID_FIELD", f"{field} is {value}, which is out of range", field=field)
        if len(self.stop) > MAX_STOPS or any(not 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in self.stop):
            raise refuse_user(
                "INVALID_FIELD",
                f"at most {MAX_STOPS} stop strings of 1 to {MAX_STOP_CHARACTERS} characters",
                field="sampling.stop",
            )

    def to_json(self) -> dict[str, Any]:
        """For the engine's request file."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """A file of an adapter's directory, or of a checkpoint, by content."""

    path: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What a caller wants answered. Empty: `weights_digest` any, `training_type` and `quantization` the base as it is,
    `adapter_files` the base alone, `chat_template` the base's own. `lora` says what a checkpoint's weights are.
    """

    base_model: str
    weights_digest: str = ""
    model_type: str = ""
    training_type: str = ""
    quantization: Quantization = field(default_factory=Quantization)
    adapter_files: tuple[AdapterFile, ...] = ()
    lora: Lora = field(default_factory=Lora)
    chat_template: str = ""
    messages: tuple[Message, ...] = ()
    sampling: Sampling = Sampling()

    def check(self) -> None:
        """Raises `Refusal` INVALID_FIELD naming the field."""
        self.sampling.check()
        _check_messages(self.messages)
        if self.chat_template and self.chat_template not in templates.REGISTRY:
            raise refuse_user(
                "INVALID_FIELD",
                f"the catalog has no chat template {self.chat_template!r}; it has {', '.join(templates.REGISTRY)}",
                field="chat_template",
            )


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise refuse_user("INVALID_FIELD", "there is no message to answer", field="messages")
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            field = f"messages[{index}].role"
            raise refuse_user("INVALID_FIELD", f"{field} must be one of {', '.join(ROLES)}", field=field)
    if messages[-1].role == "assistant":
        raise refuse_user("INVALID_FIELD", "the last message is the assistant's own", field="messages")
