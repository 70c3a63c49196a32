"""Makes a wheel smaller for a machine that only trains: leaves out whole folders, and says which and how many bytes.

Unsloth's wheel carries a web application of several times its library's size. What is left is byte for byte what was
published; the wheel's record is written anew for it.

    python -m benchmarks.peers.repack unsloth-*.whl --without studio --to DIR
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path


def repack(wheel: Path, folders: list[str], target: Path) -> str:
    """Write `wheel` without its top-level `folders` below `target`. What was done, in words."""
    target.mkdir(parents=True, exist_ok=True)
    path = target / wheel.name
    dropped_files, dropped_bytes = 0, 0
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as made:
        for member in source.infolist():
            if member.filename.split("/", 1)[0] in folders:
                dropped_files += 1
                dropped_bytes += member.compress_size
                continue
            content = source.read(member)
            if member.filename.endswith(".dist-info/RECORD"):
                kept = [line for line in content.decode().splitlines() if line.split("/", 1)[0] not in folders]
                content = ("\n".join(kept) + "\n").encode()
            made.writestr(member, content, zipfile.ZIP_DEFLATED, 9)
    size = path.stat().st_size
    return (
        f"{path.name}: {size:,} bytes; dropped {dropped_files} files of {', '.join(folders)} ({dropped_bytes:,} bytes)"
    )


def main() -> None:
    """Repacks each wheel named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--without", nargs="+", required=True, help="top-level folders to leave out")
    parser.add_argument("--to", type=Path, required=True)
    arguments = parser.parse_args()
    for wheel in arguments.wheels:
        print(repack(wheel, arguments.without, arguments.to))


if __name__ == "__main__":
    main()
