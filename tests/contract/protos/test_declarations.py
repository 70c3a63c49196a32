"""What the protos declare can be held: patterns compile, bounds agree, constraints stand where they mean something."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from google.protobuf.descriptor import FieldDescriptor, FileDescriptor

from tunesmith.common.v1 import constraints_pb2, generation_pb2, training_spec_pb2
from tunesmith.control.v1 import (
    artifact_service_pb2,
    dataset_service_pb2,
    inference_service_pb2,
    job_service_pb2,
    model_service_pb2,
    node_service_pb2,
    project_service_pb2,
)

FILES = (
    generation_pb2,
    training_spec_pb2,
    artifact_service_pb2,
    dataset_service_pb2,
    inference_service_pb2,
    job_service_pb2,
    model_service_pb2,
    node_service_pb2,
    project_service_pb2,
)
_NUMBERS = {
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
    FieldDescriptor.CPPTYPE_DOUBLE,
    FieldDescriptor.CPPTYPE_FLOAT,
}


def _constrained() -> Iterator[tuple[FieldDescriptor, constraints_pb2.FieldConstraint]]:
    for module in FILES:
        descriptor: FileDescriptor = module.DESCRIPTOR
        for message in descriptor.message_types_by_name.values():
            for field in message.fields:
                if field.GetOptions().HasExtension(constraints_pb2.constraint):
                    yield field, field.GetOptions().Extensions[constraints_pb2.constraint]


@pytest.mark.parametrize(("field", "declared"), list(_constrained()), ids=lambda value: getattr(value, "full_name", ""))
def test_a_declaration_is_sound(field: FieldDescriptor, declared: constraints_pb2.FieldConstraint) -> None:
    has_bounds = any(declared.HasField(name) for name in ("minimum", "maximum", "exclusive_minimum"))
    if has_bounds:
        assert field.cpp_type in _NUMBERS, "bounds are for numbers"
    if declared.HasField("minimum") and declared.HasField("maximum"):
        assert declared.minimum <= declared.maximum
    if declared.pattern:
        assert field.cpp_type == FieldDescriptor.CPPTYPE_STRING, "patterns are for strings"
        re.compile(declared.pattern)
        # A length that any bounded pattern gets, so that no pattern is tried on a megabyte.
        assert declared.max_length or declared.pattern == "[0-9a-f]{64}"
    if declared.max_items:
        assert field.is_repeated


def test_every_request_id_is_bounded() -> None:
    for module in FILES:
        for message in module.DESCRIPTOR.message_types_by_name.values():
            field = message.fields_by_name.get("request_id")
            if field is not None:
                assert field.GetOptions().Extensions[constraints_pb2.constraint].max_length == 64, message.full_name
