"""Translates training specs and their parts. Mix, hyper-parameters and prompts pass as proto JSON, unread."""

from __future__ import annotations

from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from control_service.domain.spec import DatasetReference, TrainingSpec, Trait, TraitDataset
from tunesmith.common.v1 import training_spec_pb2


def proto_json(message: Message) -> dict[str, Any]:
    """A message as proto JSON with proto field names; unset fields are left out, int64 values are strings."""
    if not message.ByteSize():
        return {}
    value: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return value


def spec_message(spec: TrainingSpec) -> training_spec_pb2.TrainingSpec:
    """A spec for the wire. Fields of a later version that an older database row holds no more are passed over."""
    return json_format.ParseDict(spec.to_json(), training_spec_pb2.TrainingSpec(), ignore_unknown_fields=True)


def reference_message(reference: DatasetReference) -> training_spec_pb2.DatasetReference:
    """A dataset as a node needs it."""
    return training_spec_pb2.DatasetReference(
        dataset_id=reference.dataset_id,
        sha256=reference.sha256,
        size_bytes=reference.size_bytes,
        format=reference.format,
        num_examples=reference.num_examples,
    )


def trait_value(message: training_spec_pb2.Trait) -> Trait:
    """A trait from the wire."""
    return Trait(
        trait_type=message.trait_type,
        weight=message.weight if message.HasField("weight") else None,
        datasets=tuple(
            TraitDataset(dataset_id=part.dataset_id, percentage=part.percentage) for part in message.datasets
        ),
        held_out_dataset_ids=tuple(message.held_out_dataset_ids),
        held_out_fraction=message.held_out_fraction if message.HasField("held_out_fraction") else None,
    )


def trait_message(trait: Trait) -> training_spec_pb2.Trait:
    """A trait for the wire."""
    # Fields that are None stay unset.
    return training_spec_pb2.Trait(
        trait_type=trait.trait_type,
        weight=trait.weight,
        datasets=[
            training_spec_pb2.TraitDataset(dataset_id=part.dataset_id, percentage=part.percentage)
            for part in trait.datasets
        ],
        held_out_dataset_ids=trait.held_out_dataset_ids,
        held_out_fraction=trait.held_out_fraction,
    )
