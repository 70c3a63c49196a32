"""Checks a request message against the constraints that its proto fields declare.

It reads `tunesmith.common.v1.constraint` from the descriptors and knows no message by name; meanings that lie between
fields (percentages that add up, ids that exist) belong to the domain and are refused there. It mends nothing: a value
is legal or it is named. Nearly every request is legal, and every call is checked: so a first look goes through what was
given and makes no paths; only where it finds something does a second one go through all fields and name them.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from tunesmith.common.v1 import constraints_pb2

GENERAL_MAX_LENGTH: Final = 4096
GENERAL_MAX_ITEMS: Final = 1000

# C0 and C1 controls, line and paragraph separators, and the bidirectional overrides that make a log or a name lie.
_FORBIDDEN_CHARACTERS: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
# Long text is prose: it may have lines, but nothing that could steer a terminal.
_FORBIDDEN_IN_PROSE: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

_UPDATE_MASK: Final = "update_mask"
_FIELD_MASK: Final = "google.protobuf.FieldMask"
_WELL_KNOWN: Final = "google.protobuf."


@dataclass(frozen=True, kw_only=True)
class Violation:
    """One value that breaks its declaration: a path such as `project.traits[0].weight`, and what is wrong."""

    field: str
    description: str


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """A field's declaration in the form that the check uses."""

    required: bool
    minimum: float | None
    maximum: float | None
    exclusive_minimum: float | None
    max_length: int
    max_items: int
    pattern: re.Pattern[str] | None
    forbidden: re.Pattern[str]
    is_map: bool


def check(request: Message) -> tuple[Violation, ...]:
    """Gives every violation of a request, in field order; empty when it is legal."""
    if _is_legal(request):
        return ()
    return tuple(_check_message(request, "", _masked_out(request)))


def _is_legal(message: Message) -> bool:
    """Whether nothing is wrong with what was given and everything is there that must be; an update's mask, which may
    excuse some of it, is not read. The rules are those of the second look."""
    num_needed, looks = _looks(message.DESCRIPTOR)
    for field, value in message.ListFields():
        is_needed, has_problem = looks[field.number]
        if has_problem(value):
            return False
        num_needed -= is_needed
    return num_needed == 0


def _masked_out(request: Message) -> frozenset[str]:
    """Paths that an update does not write: what the mask leaves out need not be there."""
    fields = request.DESCRIPTOR.fields_by_name
    mask_field = fields.get(_UPDATE_MASK)
    if mask_field is None or mask_field.message_type is None or mask_field.message_type.full_name != _FIELD_MASK:
        return frozenset()
    paths = set(getattr(request, _UPDATE_MASK).paths)
    if not paths:
        return frozenset()
    return frozenset(
        f"{resource.name}.{name}"
        for resource in fields.values()
        if resource is not mask_field and resource.message_type is not None
        for name in resource.message_type.fields_by_name
        if name not in paths
    )


def _check_message(message: Message, prefix: str, skipped: frozenset[str]) -> Iterator[Violation]:
    given = {field.name for field, _ in message.ListFields()}
    for field, name, rule, may_be_absent in _fields(message.DESCRIPTOR):
        if (name in given or not may_be_absent) and (path := f"{prefix}{name}") not in skipped:
            yield from _check_field(message, field, path, rule, skipped)


def _check_field(
    message: Message, field: FieldDescriptor, path: str, rule: _Rule, skipped: frozenset[str]
) -> Iterator[Violation]:
    value: Any = getattr(message, field.name)
    if rule.is_map and field.message_type is not None:
        yield from _check_map(field.message_type, value, path, rule)
    elif field.is_repeated:
        yield from _check_list(field, value, path, rule)
    elif field.has_presence and not message.HasField(field.name):
        if rule.required:
            yield Violation(field=path, description="must be set")
    elif rule.required and not field.has_presence and not value:
        yield Violation(field=path, description="must be set")
    elif field.cpp_type == FieldDescriptor.CPPTYPE_STRING and not value:
        if rule.required:
            yield Violation(field=path, description="must not be empty")
    else:
        yield from _check_value(field, value, path, rule, skipped)


def _check_list(field: FieldDescriptor, items: Any, path: str, rule: _Rule) -> Iterator[Violation]:
    if rule.required and not items:
        yield Violation(field=path, description="must have at least one item")
    if len(items) > rule.max_items:
        yield Violation(field=path, description=f"has {len(items)} items; at most {rule.max_items} are taken")
        return
    for index, item in enumerate(items):
        yield from _check_value(field, item, f"{path}[{index}]", rule, frozenset())


def _check_map(entry: Descriptor, items: Mapping[Any, Any], path: str, rule: _Rule) -> Iterator[Violation]:
    if rule.required and not items:
        yield Violation(field=path, description="must have at least one item")
    if len(items) > rule.max_items:
        yield Violation(field=path, description=f"has {len(items)} items; at most {rule.max_items} are taken")
        return
    for key in items:
        yield from _check_value(entry.fields_by_name["key"], key, f"{path} key", rule, frozenset())
        yield from _check_value(entry.fields_by_name["value"], items[key], f"{path}[{key!r}]", rule, frozenset())


def _check_value(
    field: FieldDescriptor, value: Any, path: str, rule: _Rule, skipped: frozenset[str]
) -> Iterator[Violation]:
    if field.message_type is not None:
        if not field.message_type.full_name.startswith(_WELL_KNOWN):
            yield from _check_message(value, f"{path}.", skipped)
        elif field.message_type.full_name == _FIELD_MASK:
            yield from _check_mask(field, value, path)
        return
    if problem := _CHECKS[field.cpp_type](field, value, rule):
        yield Violation(field=path, description=problem)


def _check_mask(field: FieldDescriptor, mask: Any, path: str) -> Iterator[Violation]:
    """A mask's paths are names of fields of the message that stands beside it."""
    siblings = field.containing_type.fields if field.containing_type is not None else ()
    known = {
        name
        for sibling in siblings
        if sibling.message_type is not None and not sibling.message_type.full_name.startswith(_WELL_KNOWN)
        for name in sibling.message_type.fields_by_name
    }
    if len(mask.paths) > GENERAL_MAX_ITEMS:
        yield Violation(field=path, description=f"has {len(mask.paths)} paths; at most {GENERAL_MAX_ITEMS} are taken")
        return
    for index, name in enumerate(mask.paths):
        if name not in known:
            yield Violation(
                field=f"{path}.paths[{index}]", description="is not the name of a field that can be updated"
            )


def _check_number(field: FieldDescriptor, value: float, rule: _Rule) -> str | None:
    if not math.isfinite(value):
        return "must be a finite number"
    if rule.minimum is not None and value < rule.minimum:
        return f"must be at least {rule.minimum:.12g}; it is {value:.12g}"
    if rule.exclusive_minimum is not None and value <= rule.exclusive_minimum:
        return f"must be larger than {rule.exclusive_minimum:.12g}; it is {value:.12g}"
    if rule.maximum is not None and value > rule.maximum:
        return f"must be at most {rule.maximum:.12g}; it is {value:.12g}"
    return None


def _check_text(field: FieldDescriptor, value: str | bytes, rule: _Rule) -> str | None:
    if len(value) > rule.max_length:
        # Length goes first: no pattern is ever tried on more text than was declared.
        unit = "bytes" if isinstance(value, bytes) else "characters"
        return f"has {len(value)} {unit}; at most {rule.max_length} are taken"
    if isinstance(value, str):
        if rule.forbidden.search(value):
            return "must not have control characters"
        if rule.pattern is not None and not rule.pattern.fullmatch(value):
            return f"must match {rule.pattern.pattern}"
    return None


def _check_enum(field: FieldDescriptor, value: int, rule: _Rule) -> str | None:
    if field.enum_type is not None and value not in field.enum_type.values_by_number:
        return f"{value} is not a value of {field.enum_type.name}"
    if value == 0 and (rule.required or field.is_repeated):
        return "must be a named value"
    return None


def _check_nothing(field: FieldDescriptor, value: bool, rule: _Rule) -> str | None:
    """Every boolean is legal."""
    return None


_CHECKS: Final[Mapping[int, Callable[[FieldDescriptor, Any, _Rule], str | None]]] = {
    FieldDescriptor.CPPTYPE_INT32: _check_number,
    FieldDescriptor.CPPTYPE_INT64: _check_number,
    FieldDescriptor.CPPTYPE_UINT32: _check_number,
    FieldDescriptor.CPPTYPE_UINT64: _check_number,
    FieldDescriptor.CPPTYPE_DOUBLE: _check_number,
    FieldDescriptor.CPPTYPE_FLOAT: _check_number,
    FieldDescriptor.CPPTYPE_STRING: _check_text,
    FieldDescriptor.CPPTYPE_ENUM: _check_enum,
    FieldDescriptor.CPPTYPE_BOOL: _check_nothing,
}


@cache
def _fields(descriptor: Descriptor) -> tuple[tuple[FieldDescriptor, str, _Rule, bool], ...]:
    """A message's fields in field order, with their names, their rules, and whether they need no look when they were
    not given."""
    fields: Any = descriptor.fields
    return tuple((field, str(field.name), _rule(field), _may_be_absent(field)) for field in fields)


def _may_be_absent(field: FieldDescriptor) -> bool:
    rule = _rule(field)
    if field.is_repeated or field.has_presence or rule.required:
        return not rule.required
    # Where presence is not told, what was not given is 0, which may be less than the least.
    is_text = field.cpp_type == FieldDescriptor.CPPTYPE_STRING
    return is_text or _CHECKS[field.cpp_type](field, 0, rule) is None


@cache
def _looks(descriptor: Descriptor) -> tuple[int, Mapping[int, tuple[bool, Callable[[Any], bool]]]]:
    """How many of a message's fields must be given, and by number whether a field is one of them and what tells, of a
    value that was given, whether something is wrong with it."""
    looks: dict[int, tuple[bool, Callable[[Any], bool]]] = {}
    for field, _, rule, may_be_absent in _fields(descriptor):
        looks[field.number] = not may_be_absent, _look(field, rule)
    return sum(is_needed for is_needed, _ in looks.values()), looks


def _look(field: FieldDescriptor, rule: _Rule) -> Callable[[Any], bool]:
    message_type = field.message_type
    if message_type is None:
        look = _look_at_leaf(field, rule)
    elif rule.is_map:
        return lambda items: any(_check_map(message_type, items, "", rule))
    elif not message_type.full_name.startswith(_WELL_KNOWN):
        look = _look_at_message
    else:
        look = partial(_look_at_well_known, field)
    if not field.is_repeated:
        return look
    return lambda items: len(items) > rule.max_items or any(map(look, items))


def _look_at_leaf(field: FieldDescriptor, rule: _Rule) -> Callable[[Any], bool]:
    check = _CHECKS[field.cpp_type]
    if check is not _check_text or field.is_repeated:
        return lambda value: check(field, value, rule) is not None
    # An empty text that was given is as one that was not.
    return lambda value: (check(field, value, rule) is not None) if value else rule.required


def _look_at_message(message: Message) -> bool:
    return not _is_legal(message)


def _look_at_well_known(field: FieldDescriptor, message: Message) -> bool:
    return any(_check_value(field, message, "", _rule(field), frozenset()))


@cache
def _rule(field: FieldDescriptor) -> _Rule:
    declared = field.GetOptions().Extensions[constraints_pb2.constraint]
    max_length = declared.max_length or GENERAL_MAX_LENGTH
    return _Rule(
        required=declared.required,
        minimum=declared.minimum if declared.HasField("minimum") else None,
        maximum=declared.maximum if declared.HasField("maximum") else None,
        exclusive_minimum=declared.exclusive_minimum if declared.HasField("exclusive_minimum") else None,
        max_length=max_length,
        max_items=declared.max_items or GENERAL_MAX_ITEMS,
        pattern=re.compile(declared.pattern) if declared.pattern else None,
        forbidden=_FORBIDDEN_IN_PROSE if max_length > GENERAL_MAX_LENGTH else _FORBIDDEN_CHARACTERS,
        is_map=field.message_type is not None and field.message_type.GetOptions().map_entry,
    )
