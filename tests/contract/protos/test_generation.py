"""The node's defaults, ranges and finish reasons of a generation are those that the protos declare."""

from __future__ import annotations

from dataclasses import fields

from gpu_service.domain import generation
from tunesmith.common.v1 import constraints_pb2, generation_pb2

SAMPLING = generation_pb2.DESCRIPTOR.message_types_by_name["Sampling"]


def _declared(name: str) -> constraints_pb2.FieldConstraint:
    options = SAMPLING.fields_by_name[name].GetOptions()
    declared: constraints_pb2.FieldConstraint = options.Extensions[constraints_pb2.constraint]
    return declared


def test_defaults_and_ranges_of_sampling() -> None:
    defaults = generation.Sampling()
    assert [field.name for field in fields(defaults)] == [field.name for field in SAMPLING.fields]
    for name, (smallest, largest) in generation.RANGES.items():
        declared = _declared(name)
        assert float(declared.default) == getattr(defaults, name), name
        assert (declared.exclusive_minimum if name == "top_p" else declared.minimum) == smallest, name
        assert declared.HasField("exclusive_minimum") == (name == "top_p")
        assert not declared.HasField("maximum") or declared.maximum == largest, name
    assert (_declared("stop").max_items, _declared("stop").max_length) == (
        generation.MAX_STOPS,
        generation.MAX_STOP_CHARACTERS,
    )


def test_roles() -> None:
    role = generation_pb2.DESCRIPTOR.message_types_by_name["ChatMessage"].fields_by_name["role"]
    assert role.GetOptions().Extensions[constraints_pb2.constraint].pattern == "|".join(generation.ROLES)
