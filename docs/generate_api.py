"""Writes what the documents say of the protos and of the services' settings, from those themselves.

usage: generate_api.py [--check]

docs/api.md is written whole: every RPC, field, default and enum, with the protos' own comments. In docs/training.md and
docs/operations.md only the tables between `<!-- generated: NAME -->` and `<!-- end -->` are. Needs `buf` on the PATH.
With --check nothing is written; exit status 1 when a page is not what it should be.
"""

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2
from pydantic_settings import BaseSettings

import control_service.config
import gpu_service.config
from tunesmith.common.v1 import constraints_pb2

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
COMMAND = "make docs"

_TYPES = {
    number: name.removeprefix("TYPE_").lower() for name, number in descriptor_pb2.FieldDescriptorProto.Type.items()
}
# Field numbers in descriptor.proto, which paths of comments are made of.
_MESSAGES, _ENUMS, _SERVICES, _MEMBERS, _GROUPS = 4, 5, 6, 2, 8
_MARKED = re.compile(r"(<!-- generated: ([a-z ]+) -->)\n.*?(<!-- end -->)", re.DOTALL)

Comments = dict[tuple[int, ...], str]


def read_files() -> list[descriptor_pb2.FileDescriptorProto]:
    """The product's proto files with their comments, as buf parses them."""
    image = subprocess.run(["buf", "build", "proto", "-o", "-"], cwd=ROOT, capture_output=True, check=True).stdout
    files = descriptor_pb2.FileDescriptorSet.FromString(image).file
    return [file for file in files if file.package.startswith("tunesmith.")]


def page(files: list[descriptor_pb2.FileDescriptorProto]) -> str:
    """The whole page."""
    lines = [
        "# API",
        "",
        f"Generated from `proto/` by `{COMMAND}`; edit the protos. People and programs speak to the control service",
        "(`tunesmith.control.v1`); `tunesmith.gpu.v1` lies between the two services. Errors are `google.rpc.Status`;",
        "their reasons are the names of [ErrorReason](#enum-errorreason) without the prefix.",
        "",
        *_index(files),
        "",
    ]
    order = {"tunesmith.control.v1": 0, "tunesmith.common.v1": 1, "tunesmith.gpu.v1": 2}
    package = ""
    for file in sorted(files, key=lambda file: (order.get(file.package, 9), file.name)):
        if file.package != package:
            package = file.package
            lines += [f"## {package}", ""]
        comments = {tuple(place.path): _comment(place) for place in file.source_code_info.location}
        lines += [f"### {Path(file.name).name}", ""]
        lines += _services(file, comments)
        lines += _messages(file, comments)
        lines += _enums(file, comments)
    return "\n".join(lines)


def _index(files: list[descriptor_pb2.FileDescriptorProto]) -> Iterator[str]:
    yield from ("| service | methods |", "|---|---|")
    for service in (service for file in files for service in file.service):
        methods = ", ".join(method.name for method in service.method)
        yield f"| [{service.name}](#service-{service.name.lower()}) | {methods} |"


def _services(file: descriptor_pb2.FileDescriptorProto, comments: Comments) -> Iterator[str]:
    for index, service in enumerate(file.service):
        yield from (f"#### service {service.name}", "", _text(comments, _SERVICES, index), "")
        for position, method in enumerate(service.method):
            request = _stream(method.client_streaming) + _link(method.input_type)
            response = _stream(method.server_streaming) + _link(method.output_type)
            yield f"* **{method.name}** ({request}) → {response}<br>"
            yield f"  {_text(comments, _SERVICES, index, _MEMBERS, position)}"
        yield ""


def _messages(file: descriptor_pb2.FileDescriptorProto, comments: Comments) -> Iterator[str]:
    for index, message in enumerate(file.message_type):
        yield from (f"#### {message.name}", "")
        if text := _text(comments, _MESSAGES, index):
            yield from (text, "")
        rows = []
        for position, field in enumerate(message.field):
            constraint = field.options.Extensions[constraints_pb2.constraint]
            text = _text(comments, _MESSAGES, index, _MEMBERS, position)
            cells = (_cell(text), _cell(_legal(constraint)), _cell(constraint.default))
            rows.append((f"`{field.name}`", _type(field, message), *cells))
        if rows:
            yield from _table(("field", "type", "meaning", "legal values", "unset means"), rows)
            yield ""


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Without the columns that no row has anything in."""
    kept = [position for position in range(len(columns)) if any(row[position] for row in rows)]
    yield f"| {' | '.join(columns[position] for position in kept)} |"
    yield "|" + "---|" * len(kept)
    for row in rows:
        yield f"| {' | '.join(row[position] for position in kept)} |"


def _enums(file: descriptor_pb2.FileDescriptorProto, comments: Comments) -> Iterator[str]:
    for index, enum in enumerate(file.enum_type):
        yield from (
            f"#### enum {enum.name}",
            "",
            _text(comments, _ENUMS, index),
            "",
            "| value | meaning |",
            "|---|---|",
        )
        for position, value in enumerate(enum.value):
            yield f"| `{value.name}` = {value.number} | {_cell(_text(comments, _ENUMS, index, _MEMBERS, position))} |"
        yield ""


def _type(field: descriptor_pb2.FieldDescriptorProto, message: descriptor_pb2.DescriptorProto) -> str:
    for nested in message.nested_type:
        if nested.options.map_entry and field.type_name.endswith(f".{nested.name}"):
            key, value = nested.field
            return f"map of {_TYPES[key.type]} to {_link(value.type_name) if value.type_name else _TYPES[value.type]}"
    is_enum = field.type == descriptor_pb2.FieldDescriptorProto.TYPE_ENUM
    name = _link(field.type_name, is_enum=is_enum) if field.type_name else _TYPES[field.type]
    if field.label == descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED:
        return f"list of {name}"
    if field.proto3_optional:
        return f"optional {name}"
    if field.HasField("oneof_index"):
        return f"{name}, one of `{message.oneof_decl[field.oneof_index].name}`"
    return name


def _legal(constraint: constraints_pb2.FieldConstraint) -> str:
    parts = ["required"] if constraint.required else []
    if constraint.HasField("minimum"):
        parts.append(f"≥ {_number(constraint.minimum)}")
    if constraint.HasField("exclusive_minimum"):
        parts.append(f"> {_number(constraint.exclusive_minimum)}")
    if constraint.HasField("maximum"):
        parts.append(f"≤ {_number(constraint.maximum)}")
    if constraint.max_length:
        parts.append(f"at most {constraint.max_length} long")
    if constraint.max_items:
        parts.append(f"at most {constraint.max_items} items")
    if constraint.pattern:
        parts.append(f"`{constraint.pattern}`")
    return ", ".join(parts)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() else f"{value:g}"


def _link(full_name: str, *, is_enum: bool = False) -> str:
    name = full_name.rsplit(".", 1)[-1]
    if not full_name.startswith(".tunesmith."):
        return name
    return f"[{name}](#{'enum-' if is_enum else ''}{name.lower()})"


def _stream(is_stream: bool) -> str:
    return "stream of " if is_stream else ""


def _comment(place: descriptor_pb2.SourceCodeInfo.Location) -> str:
    return " ".join((place.leading_comments or place.trailing_comments).split())


def _text(comments: Comments, *path: int) -> str:
    return comments.get(path, "")


def _cell(text: str) -> str:
    # Outside of code, what looks like a tag would not be shown.
    parts = text.replace("|", "\\|").split("`")
    return "`".join(part if index % 2 else part.replace("<", "&lt;") for index, part in enumerate(parts))


def hyperparameters_table(files: list[descriptor_pb2.FileDescriptorProto]) -> str:
    """Every hyper-parameter by its dotted name, with default, legal values and meaning."""
    (file,) = (file for file in files if file.name.endswith("training_spec.proto"))
    comments = {tuple(place.path): _comment(place) for place in file.source_code_info.location}
    return "\n".join(
        ["| name | default | legal values | meaning |", "|---|---|---|---|"]
        + [f"| {' | '.join(row)} |" for name in ("Hyperparameters", "Mix") for row in _settable(file, comments, name)]
    )


def _settable(
    file: descriptor_pb2.FileDescriptorProto, comments: Comments, message_name: str, prefix: str = ""
) -> Iterator[tuple[str, str, str, str]]:
    index, message = next((i, m) for i, m in enumerate(file.message_type) if m.name == message_name)
    prefix = "mix." if message_name == "Mix" else prefix
    for position, field in enumerate(message.field):
        name = f"{prefix}{field.name}"
        if field.type == descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE:
            yield from _settable(file, comments, field.type_name.rsplit(".", 1)[-1], f"{name}.")
            continue
        constraint = field.options.Extensions[constraints_pb2.constraint]
        meaning = _text(comments, _MESSAGES, index, _MEMBERS, position)
        default = constraint.default
        if not default and field.HasField("oneof_index"):
            # The comment of the group says what it means that none of its fields is set.
            default = _text(comments, _MESSAGES, index, _GROUPS, field.oneof_index)
        yield f"`{name}`", _cell(default), _cell(_legal(constraint)), _cell(meaning)


def settings_table(settings: type[BaseSettings], prefix: str) -> str:
    """Every setting of a service: flag, default, bounds, meaning."""
    rows = []
    for name, field in settings.model_fields.items():
        bounds = ", ".join(
            f"{sign} {getattr(bound, attribute):g}"
            for bound in field.metadata
            for attribute, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"))
            if hasattr(bound, attribute)
        )
        flag = f"`--{name.replace('_', '-')}`"
        rows.append(f"| {flag} | {_default_text(field.default)} | {bounds} | {_cell(field.description or '')} |")
    header = f"Each is also the variable `{prefix}<NAME>`."
    return "\n".join([header, "", "| flag | default | bounds | meaning |", "|---|---|---|---|", *rows])


def _default_text(value: Any) -> str:
    if value is None or value == Path():
        return ""
    if isinstance(value, tuple):
        text = " ".join(str(item) for item in value).replace(sys.executable, "python")
    elif isinstance(value, bool):
        text = "on" if value else "off"
    else:
        text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"`{text}`"


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """A page with each generated table put between its marks. KeyError for a mark that no table has."""
    return _MARKED.sub(lambda found: f"{found[1]}\n{tables[found[2]]}\n{found[3]}", text)


def pages() -> dict[Path, str]:
    """Every page that this program writes, as it should be."""
    files = read_files()
    tables = {
        "hyperparameters": hyperparameters_table(files),
        "control settings": settings_table(control_service.config.Settings, control_service.config.ENVIRONMENT_PREFIX),
        "gpu settings": settings_table(gpu_service.config.Settings, gpu_service.config.ENVIRONMENT_PREFIX),
    }
    marked = (DOCS / "training.md", DOCS / "operations.md")
    return {DOCS / "api.md": page(files)} | {path: with_tables(path.read_text("utf-8"), tables) for path in marked}


def main(arguments: list[str]) -> int:
    """Writes the pages, or checks them."""
    stale = [path for path, text in pages().items() if not path.is_file() or path.read_text("utf-8") != text]
    if "--check" not in arguments:
        for path in stale:
            path.write_text(pages()[path], encoding="utf-8")
        return 0
    for path in stale:
        sys.stderr.write(f"docs/{path.name} is not what the code says; run `{COMMAND}`\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
