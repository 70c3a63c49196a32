"""Writes the demo's four data sets from hand-written topics and units; the same input gives the same bytes.

It draws no random numbers, reads no network and writes only beside itself (or where it is told to).
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent

QUESTIONS = (
    "What is {phrase}?",
    "Tell me about {phrase}.",
    "Can you explain what {phrase} is?",
    "Give me a fact about {phrase}.",
    "I want to know something about {phrase}.",
    "Please describe {phrase}.",
    "How would you describe {phrase} to a child?",
    "What should I know about {phrase}?",
    "Say something interesting about {phrase}.",
    "My daughter asked me about {phrase}. What do I say?",
    "Write a short note about {phrase}.",
)
EVERY_NTH_TOPIC_IS_HELD_OUT = 5

# One unit, how many of the other make it up, and the other: both in singular and plural.
UNITS = (
    (("meter", "meters"), 100, ("centimeter", "centimeters")),
    (("kilometer", "kilometers"), 1000, ("meter", "meters")),
    (("centimeter", "centimeters"), 10, ("millimeter", "millimeters")),
    (("kilogram", "kilograms"), 1000, ("gram", "grams")),
    (("liter", "liters"), 1000, ("milliliter", "milliliters")),
    (("hour", "hours"), 60, ("minute", "minutes")),
    (("minute", "minutes"), 60, ("second", "seconds")),
    (("day", "days"), 24, ("hour", "hours")),
    (("week", "weeks"), 7, ("day", "days")),
    (("year", "years"), 12, ("month", "months")),
    (("foot", "feet"), 12, ("inch", "inches")),
    (("yard", "yards"), 3, ("foot", "feet")),
    (("gallon", "gallons"), 4, ("quart", "quarts")),
    (("dollar", "dollars"), 100, ("cent", "cents")),
    (("dozen", "dozen"), 12, ("egg", "eggs")),
    (("century", "centuries"), 100, ("year", "years")),
)
TRAINING_COUNTS = (2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 15, 20, 25, 30)
HELD_OUT_COUNTS = (7, 14)
CONVERSIONS = (
    "How many {small} are in {count} {large}?",
    "Convert {count} {large} to {small}.",
    "What is {count} {large} in {small}?",
    "I have {count} {large}. How many {small} is that?",
    "Please change {count} {large} into {small}.",
    "{count} {large} is how many {small}?",
    "Write {count} {large} as {small}.",
)


def structure_examples() -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Chat questions about a topic, each answered with one JSON object; held-out topics are in no training question."""
    with (HERE / "topics.csv").open(encoding="utf-8", newline="") as file:
        topics = list(csv.DictReader(file))
    training: list[dict[str, object]] = []
    held_out: list[dict[str, object]] = []
    for index, topic in enumerate(topics):
        if index % EVERY_NTH_TOPIC_IS_HELD_OUT == EVERY_NTH_TOPIC_IS_HELD_OUT - 1:
            held_out.append(_structure_example(topic, len(held_out)))
        else:
            # Two questions a topic, so that the question's wording does not tell the topic.
            training.extend(_structure_example(topic, index + shift) for shift in (0, 5))
    return training, held_out


def _structure_example(topic: dict[str, str], question: int) -> dict[str, object]:
    phrase = topic["phrase"]
    name = phrase.partition(" ")[2] if phrase.split(" ")[0] in ("a", "an", "the") else phrase
    answer = json.dumps({"topic": name, "kind": topic["kind"], "fact": topic["fact"]})
    return {
        "messages": [
            {"role": "user", "content": QUESTIONS[question % len(QUESTIONS)].format(phrase=phrase)},
            {"role": "assistant", "content": answer},
        ]
    }


def units_examples() -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Unit conversions, each answered in the same three lines; held-out counts are in no training question."""
    training = [
        _units_example(pair, count, first + second)
        for first, count in enumerate(TRAINING_COUNTS)
        for second, pair in enumerate(UNITS)
    ]
    held_out = [
        _units_example(pair, count, first + second)
        for first, count in enumerate(HELD_OUT_COUNTS)
        for second, pair in enumerate(UNITS)
    ]
    return training, held_out


def _units_example(pair: tuple[tuple[str, str], int, tuple[str, str]], count: int, question: int) -> dict[str, object]:
    (large, larges), factor, (_, smalls) = pair
    task = CONVERSIONS[question % len(CONVERSIONS)].format(count=count, large=larges, small=smalls)
    # The words around the task make a model that was never trained on it answer at all: a bare question ends its text.
    # The completion brings the space or line break that follows the prompt, so that both can be joined as they stand.
    return {
        "prompt": f"Question: {task}\nAnswer:",
        "completion": f"\nGiven: {count} {larges}\nRule: 1 {large} = {factor} {smalls}\n"
        f"Result: {count} x {factor} = {count * factor} {smalls}",
    }


def write_lines(path: Path, examples: Iterable[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")


def main(directory: Path) -> None:
    for name, (training, held_out) in (("structure", structure_examples()), ("units", units_examples())):
        write_lines(directory / f"{name}-train.jsonl", training)
        write_lines(directory / f"{name}-held-out.jsonl", held_out)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
