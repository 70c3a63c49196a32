"""Writes docs/api.md from the protos: every RPC, field, default and enum, with the protos' own comments.

usage: generate_api.py [--check]

Needs `buf` on the PATH. With --check nothing is written; exit status 1 when the page is not what the protos say.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from google.protobuf import descriptor_pb2

from tunesmith.common.v1 import constraints_pb2

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
COMMAND = "make docs"

_TYPES = {
    number: name.removeprefix("TYPE_").lower() for name, number in descriptor_pb2.FieldDescriptorProto.Type.items()
}
# Field numbers in descriptor.proto, which paths of comments are made of.
_MESSAGES, _ENUMS, _SERVICES, _MEMBERS = 4, 5, 6, 2

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
        "(`tunesmith.control.v1`); `tunesmith.gpu.v1` lies between the two services.",
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
        if message.field:
            yield from ("| field | type | meaning | legal values | unset means |", "|---|---|---|---|---|")
        for position, field in enumerate(message.field):
            constraint = field.options.Extensions[constraints_pb2.constraint]
            text = _text(comments, _MESSAGES, index, _MEMBERS, position)
            yield (
                f"| `{field.name}` | {_type(field, message)} | {_cell(text)} | {_cell(_legal(constraint))} "
                f"| {_cell(constraint.default)} |"
            )
        if message.field:
            yield ""


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
    name = _link(field.type_name) if field.type_name else _TYPES[field.type]
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
        parts.append(f"≥ {constraint.minimum:g}")
    if constraint.HasField("exclusive_minimum"):
        parts.append(f"> {constraint.exclusive_minimum:g}")
    if constraint.HasField("maximum"):
        parts.append(f"≤ {constraint.maximum:g}")
    if constraint.max_length:
        parts.append(f"at most {constraint.max_length} long")
    if constraint.max_items:
        parts.append(f"at most {constraint.max_items} items")
    if constraint.pattern:
        parts.append(f"`{constraint.pattern}`")
    return ", ".join(parts)


def _link(full_name: str) -> str:
    name = full_name.rsplit(".", 1)[-1]
    if not full_name.startswith(".tunesmith."):
        return name
    return f"[{name}](#{name.lower()})"


def _stream(is_stream: bool) -> str:
    return "stream of " if is_stream else ""


def _comment(place: descriptor_pb2.SourceCodeInfo.Location) -> str:
    return " ".join((place.leading_comments or place.trailing_comments).split())


def _text(comments: Comments, *path: int) -> str:
    return comments.get(path, "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: list[str]) -> int:
    """Writes the page, or checks it."""
    text = page(read_files())
    if "--check" not in arguments:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    sys.stderr.write(f"docs/api.md is not what the protos say; run `{COMMAND}`\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
