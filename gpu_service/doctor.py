"""Checks the installed libraries against what training needs and what is known to be broken; says what to install.

Reads package metadata only: no library is imported, so that a broken one cannot break the check. Run it as
`python -m gpu_service.doctor [--output json]`: exit code 0 when the node can train, 1 when it cannot.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownBad:
    """A released version that cannot be trained with."""

    library: str
    version: str
    reason: str
    install: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Why the node refuses to train."""

    library: str
    # Empty when it is not installed.
    version: str
    reason: str
    # A requirement for pip.
    install: str


# What the engine and the planner import, with the oldest release that they are written for.
REQUIRED: Mapping[str, str] = {
    "torch": "torch>=2.10",
    "transformers": "transformers>=5.0,<6",
    "peft": "peft>=0.18",
    "accelerate": "accelerate>=1.10",
    "bitsandbytes": "bitsandbytes>=0.50.2",
    "safetensors": "safetensors>=0.7",
    "tokenizers": "tokenizers>=0.22",
    "jinja2": "jinja2>=3.1",
    "pyarrow": "pyarrow>=20",
}

KNOWN_BAD: Sequence[KnownBad] = (
    KnownBad(
        library="transformers",
        version="4.57.2",
        reason=(
            "AutoTokenizer on a local directory reads config.json as a dict and asks it for .model_type, so that "
            "loading a Llama 3 fails with "
            "\"'dict' object has no attribute 'model_type'\" (huggingface/transformers #42374)"
        ),
        install="transformers>=5.0,<6",
    ),
)


def installed_version(library: str) -> str:
    """Version of an installed distribution; empty when there is none."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


def read_versions(read: Callable[[str], str] = installed_version) -> dict[str, str]:
    """Version of each required library that is installed, and of Python."""
    versions = {library: version for library in REQUIRED if (version := read(library))}
    return {"python": sys.version.split()[0], **versions}


def find_problems(versions: Mapping[str, str]) -> list[Problem]:
    """What keeps a node with these versions from training; missing libraries first."""
    missing = [
        Problem(library=library, version="", reason=f"{library} is not installed", install=requirement)
        for library, requirement in REQUIRED.items()
        if library not in versions
    ]
    broken = [
        Problem(library=bad.library, version=bad.version, reason=bad.reason, install=bad.install)
        for bad in KNOWN_BAD
        if versions.get(bad.library) == bad.version
    ]
    return missing + broken


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gpu_service.doctor", description=__doc__)
    parser.add_argument("--output", choices=("text", "json"), default="text")
    options = parser.parse_args(arguments)
    versions = read_versions()
    problems = find_problems(versions)
    if options.output == "json":
        report = {"ok": not problems, "versions": versions, "problems": [asdict(problem) for problem in problems]}
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    else:
        lines = [f"{library:14} {version}" for library, version in versions.items()]
        lines += [
            f"PROBLEM: {problem.library} {problem.version}: {problem.reason}\n  pip install '{problem.install}'"
            for problem in problems
        ]
        sys.stdout.write(
            "\n".join([*lines, "this node can train" if not problems else "this node cannot train"]) + "\n"
        )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
