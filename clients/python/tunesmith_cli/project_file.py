"""A project as people write it: YAML to the contract's Project, strictly, every error with its line. Calls no service.

The keys are the contract's field names, with two shorthands in a trait: `datasets: [{dataset: NAME_OR_ID, percentage}]`
and `held_out_datasets: [NAME_OR_ID]`. An unknown or repeated key is an error. Numbers may be written as YAML 1.2 has
them (`2e-4`), which YAML 1.1 reads as text.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.json_format import ParseDict

from tunesmith.common.v1 import training_spec_pb2
from tunesmith.control.v1 import project_service_pb2
from tunesmith_client import NotFound

DatasetLookup = Callable[[str], int]

_OUTPUT_ONLY = frozenset(("project_id", "create_time", "update_time", "etag"))
_INTEGERS = frozenset((FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT32))


class ProjectFileError(Exception):
    """The file is wrong; the message names file, line and what was expected."""


def read_project(text: str, *, source: str, dataset_id_of: DatasetLookup) -> project_service_pb2.Project:
    """The project that the text describes. `source` names the file in errors; datasets are looked up one by one."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ProjectFileError(f"{source}:{line}: {error.problem}") from error
    if node is None:
        raise ProjectFileError(f"{source}:1: the file is empty")
    reader = _Reader(source, dataset_id_of)
    values = reader.message(node, project_service_pb2.Project.DESCRIPTOR, "")
    return ParseDict(values, project_service_pb2.Project())


class _Reader:
    def __init__(self, source: str, dataset_id_of: DatasetLookup) -> None:
        self._source = source
        self._dataset_id_of = dataset_id_of

    def message(self, node: yaml.Node, descriptor: Descriptor, path: str) -> dict[str, Any]:
        """A mapping node as a dict that ParseDict takes."""
        if not isinstance(node, yaml.MappingNode):
            raise self._error(node, f"{path or 'the file'} must be a mapping")
        shorthands = _SHORTHANDS.get(descriptor.full_name, {})
        fields = {name: field for name, field in descriptor.fields_by_name.items() if name not in _OUTPUT_ONLY}
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else ""
            where = f"{path}.{key}" if path else key
            target = shorthands.get(key, key)
            if target not in fields:
                known = ", ".join(sorted(set(fields) | set(shorthands)))
                raise self._error(key_node, f"unknown key `{where}`; known here: {known}")
            if target in values:
                raise self._error(key_node, f"`{where}` is given twice")
            group = fields[target].containing_oneof
            # Every optional field is alone in a group of its own.
            for other in group.fields if group is not None else ():
                if other.name in values:
                    raise self._error(key_node, f"`{where}` does not go together with `{other.name}`; give one of them")
            values[target] = self._field(value_node, fields[target], where, is_dataset=key in shorthands)
        return values

    def _field(self, node: yaml.Node, field: FieldDescriptor, path: str, *, is_dataset: bool) -> Any:
        if not field.is_repeated:
            return self._value(node, field, path, is_dataset=is_dataset)
        if not isinstance(node, yaml.SequenceNode):
            raise self._error(node, f"`{path}` must be a list")
        return [
            self._value(item, field, f"{path}[{index}]", is_dataset=is_dataset) for index, item in enumerate(node.value)
        ]

    def _value(self, node: yaml.Node, field: FieldDescriptor, path: str, *, is_dataset: bool) -> Any:
        if field.message_type is not None:
            return self.message(node, field.message_type, path)
        if not isinstance(node, yaml.ScalarNode):
            raise self._error(node, f"`{path}` must be a single value")
        if is_dataset:
            try:
                return self._dataset_id_of(node.value)
            except NotFound as error:
                # The service's answer knows no file: the line is added, the rest stays as it is.
                error.message = f"{self._source}:{node.start_mark.line + 1}: {error.message}"
                raise
        expected, convert = _SCALARS[_scalar_kind(field)]
        try:
            return convert(node)
        except ValueError:
            raise self._error(node, f"`{path}` must be {expected}, not `{node.value}`") from None

    def _error(self, node: yaml.Node, message: str) -> ProjectFileError:
        return ProjectFileError(f"{self._source}:{node.start_mark.line + 1}: {message}")


def _scalar_kind(field: FieldDescriptor) -> str:
    if field.cpp_type in _INTEGERS:
        return "integer"
    return {FieldDescriptor.CPPTYPE_DOUBLE: "number", FieldDescriptor.CPPTYPE_BOOL: "boolean"}.get(
        field.cpp_type, "text"
    )


def _integer(node: yaml.ScalarNode) -> int:
    if node.style in ("'", '"'):
        raise ValueError
    return int(node.value)


def _number(node: yaml.ScalarNode) -> float | str:
    if node.style in ("'", '"'):
        raise ValueError
    value = float(node.value.replace(".nan", "nan").replace(".inf", "inf"))
    if math.isfinite(value):
        return value
    # Goes through, as proto JSON spells it: what is legal is the service's to say, once.
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _boolean(node: yaml.ScalarNode) -> bool:
    words = {"true": True, "false": False}
    if node.style in ("'", '"') or node.value not in words:
        raise ValueError
    return words[node.value]


def _text(node: yaml.ScalarNode) -> str:
    if node.tag == "tag:yaml.org,2002:null":
        raise ValueError
    return str(node.value)


_SCALARS: Mapping[str, tuple[str, Callable[[yaml.ScalarNode], Any]]] = {
    "integer": ("a whole number", _integer),
    "number": ("a number", _number),
    "boolean": ("true or false", _boolean),
    "text": ("text", _text),
}

# By message: a key for people -> the field that takes the dataset's id.
_SHORTHANDS: Mapping[str, Mapping[str, str]] = {
    training_spec_pb2.Trait.DESCRIPTOR.full_name: {"held_out_datasets": "held_out_dataset_ids"},
    training_spec_pb2.TraitDataset.DESCRIPTOR.full_name: {"dataset": "dataset_id"},
}
