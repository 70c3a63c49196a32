"""Projects on the wire. Fields marked output only are not read from requests."""

from __future__ import annotations

from google.protobuf import json_format

from control_service.domain.project import Project, ProjectDraft
from control_service.wire.training_spec import proto_json, trait_message, trait_value
from control_service.wire.values import timestamp
from tunesmith.common.v1 import training_spec_pb2
from tunesmith.control.v1 import project_service_pb2


def project_draft(message: project_service_pb2.Project) -> ProjectDraft:
    """The fields that a person writes."""
    return ProjectDraft(
        name=message.name,
        base_model=message.base_model,
        model_type=message.model_type,
        training_type=message.training_type,
        output_directory=message.output_directory,
        traits=tuple(trait_value(trait) for trait in message.traits),
        mix=proto_json(message.mix),
        hyperparameters=proto_json(message.hyperparameters),
        sample_prompts=tuple(proto_json(prompt) for prompt in message.sample_prompts),
    )


def project_message(project: Project) -> project_service_pb2.Project:
    """A stored project."""
    draft = project.draft
    message = project_service_pb2.Project(
        project_id=project.project_id,
        name=draft.name,
        base_model=draft.base_model,
        model_type=draft.model_type,
        training_type=draft.training_type,
        output_directory=draft.output_directory,
        traits=[trait_message(trait) for trait in draft.traits],
        sample_prompts=[
            json_format.ParseDict(dict(prompt), training_spec_pb2.SamplePrompt()) for prompt in draft.sample_prompts
        ],
        create_time=timestamp(project.create_time),
        update_time=timestamp(project.update_time),
        etag=project.etag,
    )
    # An empty part was never set; setting it would make a client believe that someone chose something.
    if draft.mix:
        json_format.ParseDict(dict(draft.mix), message.mix)
    if draft.hyperparameters:
        json_format.ParseDict(dict(draft.hyperparameters), message.hyperparameters)
    return message
