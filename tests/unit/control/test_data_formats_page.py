"""The worked example of docs/training.md, "Data formats": what the page says is what happens."""

from __future__ import annotations

import gzip
import io
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console

from control_service.api.wire.datasets import dataset_message
from control_service.domain.dataset import Dataset
from control_service.domain.dataset_files import FileLimits
from control_service.domain.errors import InvalidArgument
from control_service.domain.json_text import canonical_bytes
from control_service.domain.row_shapes import KEYS
from tests.fakes.dataset_files import read_file
from tunesmith_cli.dataset_view import show_dataset
from tunesmith_cli.output import Format, Output

PAGE = Path(__file__).parents[3] / "docs" / "training.md"
SECTION = PAGE.read_text().partition("\n## Data formats\n")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"```\w+\n(.*?)```", SECTION, re.DOTALL)


def test_the_example_is_kept_and_counted_as_the_page_says() -> None:
    file, rows, said = BLOCKS[:3]
    packed = gzip.compress(file.encode(), mtime=0)
    read = read_file(packed)
    kept = b"".join(canonical_bytes(row) + b"\n" for row in read.rows)
    assert kept.decode() == rows
    dataset = Dataset(
        dataset_id=1,
        name="answers",
        create_time=datetime(2026, 1, 2, tzinfo=UTC),
        sha256="a" * 64,
        size_bytes=len(kept),
        num_examples=read.summary.num_examples,
        format=read.summary.format,
        file_format=read.file_format,
        compression=read.compression,
        file_sha256="b" * 64,
        file_size_bytes=len(packed),
        statistics=read.summary.statistics,
    )
    written = io.StringIO()
    show_dataset(Output(Format.TABLE, console=Console(file=written, width=200)), dataset_message(dataset))
    shown = [line.rstrip() for line in written.getvalue().splitlines()]
    # How small gzip makes a file is its own affair.
    said_lines = [line for line in said.splitlines() if not line.startswith("file ")]
    assert said_lines == [line for line in shown if line in said_lines]
    assert any(line.startswith("file         csv, gzip of ") for line in shown)


def test_the_bad_example_is_refused_as_the_page_says() -> None:
    file, said = BLOCKS[3:5]
    with pytest.raises(InvalidArgument) as refused:
        read_file(file.encode())
    message, *others = said.splitlines()
    assert refused.value.message == message
    assert [f"{v.field}: {v.description}" for v in refused.value.violations[1:]] == others


def test_the_page_names_every_format_and_the_limits_that_hold() -> None:
    limits = FileLimits()
    for format in KEYS:
        assert f"| `{format}` |" in SECTION
    text = " ".join(SECTION.split())
    for said in (
        f"{limits.max_compared_rows:,} different rows",
        f"longer than {limits.max_row_bytes >> 20} MiB",
        f"deeper than {limits.max_depth}",
        f"more than {limits.max_columns} columns or {limits.max_rows // 10**6} million rows",
        f"more than {limits.max_decompressed_bytes >> 30} GiB, or, above {limits.ratio_floor_bytes >> 20} MiB, "
        f"more than {limits.max_ratio} times",
    ):
        assert said in text
