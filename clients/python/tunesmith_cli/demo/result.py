"""What the demo learned: held-out loss per trait and answers, before and after. Reads events; asks no model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.common.v1 import event_pb2
from tunesmith_cli.describe import loss_of, loss_text
from tunesmith_cli.output import Output
from tunesmith_cli.text import indented_lines
from tunesmith_client import Client

BEFORE, AFTER = event_pb2.EVALUATION_MOMENT_BASE, event_pb2.EVALUATION_MOMENT_FINAL


@dataclass(kw_only=True)
class DemoResult:
    """Losses by (trait, moment) and answers by (prompt, moment), as the job's log told them."""

    job_id: str
    losses: dict[tuple[str, int], float | None] = field(default_factory=dict)
    answers: dict[tuple[str, int], str] = field(default_factory=dict)

    def add(self, event: event_pb2.Event) -> None:
        """Takes what an event tells; a later attempt's word replaces an earlier one's."""
        if event.kind == event_pb2.EVENT_KIND_EVALUATION:
            evaluation = event.payload.evaluation
            for value in evaluation.losses:
                if not value.dataset_id:
                    self.losses[value.trait_type, evaluation.moment] = loss_of(value)
        elif event.kind == event_pb2.EVENT_KIND_SAMPLE:
            sample = event.payload.sample
            self.answers[sample.prompt, sample.moment] = sample.answer

    def traits(self) -> list[str]:
        """Traits that were measured, in order of appearance."""
        return list(dict.fromkeys(trait for trait, _ in self.losses))

    def fell(self, trait: str) -> bool:
        """Whether the trait's held-out loss is lower than before; not when either was not measured or not finite."""
        before, after = self.losses.get((trait, BEFORE)), self.losses.get((trait, AFTER))
        return before is not None and after is not None and after < before

    def all_fell(self) -> bool:
        """Whether every trait's held-out loss fell, and there was one."""
        return bool(self.traits()) and all(self.fell(trait) for trait in self.traits())


def fetch_artifacts(out: Output, client: Client, job_id: str, directory: Path) -> list[Path]:
    """Downloads everything that the job left into `<directory>/<artifact>/`."""
    files: list[Path] = []
    for artifact in client.artifacts.list(job_id):
        out.remark(f"downloading {artifact.name}")
        files += client.artifacts.download(job_id, artifact.name, directory / artifact.name)
    return files


def report(out: Output, result: DemoResult, files: Sequence[Path]) -> bool:
    """Prints answers, losses and files; gives whether every trait's loss fell."""
    for prompt in dict.fromkeys(prompt for prompt, _ in result.answers):
        out.line("")
        answers = (("before", BEFORE), ("after", AFTER))
        parts = [("prompt", prompt)]
        parts += [(label, result.answers.get((prompt, moment), "(not answered)")) for label, moment in answers]
        for label, text in parts:
            out.line(f"{label}:")
            for line in indented_lines(text, 4):
                out.line(line)
    out.line("")
    rows = [
        (
            trait,
            loss_text(result.losses.get((trait, BEFORE))),
            loss_text(result.losses.get((trait, AFTER))),
            "fell" if result.fell(trait) else "DID NOT FALL",
        )
        for trait in result.traits()
    ]
    out.rows(("TRAIT", "BEFORE", "AFTER", ""), rows, title="Held-out loss")
    for path in files:
        out.line(str(path))
    if not result.all_fell():
        out.remark("the held-out loss of every trait should have fallen; it did not", style="red")
    return result.all_fell()
