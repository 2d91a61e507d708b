"""What the kernel is built from. Read by the build too, so nothing is imported here but the standard library."""

from __future__ import annotations

import hashlib
from pathlib import Path

FOLDER = Path(__file__).parent


def files(folder: Path = FOLDER) -> list[Path]:
    """The C++ files; none where only the package was installed."""
    return sorted(file for file in folder.rglob("*") if file.suffix in {".cpp", ".hpp"})


def digest(folder: Path = FOLDER) -> str:
    """SHA-256 over names and contents of these files, 64 hexadecimal digits."""
    hashed = hashlib.sha256()
    for file in files(folder):
        content = file.read_bytes()
        hashed.update(f"{file.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return hashed.hexdigest()
