"""What the device and its software are, and the rates that all other numbers are held against."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu.measure import Bench


def tell_facts(bench: Bench, d: int) -> None:
    """Versions, and the card's own numbers."""
    facts = {"python": platform.python_version(), "cuda": torch.version.cuda, "host": platform.platform()}
    for package in ("torch", "triton", "numpy", "mpi4py"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    if bench.device.type == "cuda":
        properties = torch.cuda.get_device_properties(bench.device)
        facts |= {"multiprocessors": str(properties.multi_processor_count), "bytes": str(properties.total_memory)}
    note = ", ".join(f"{name} {value}" for name, value in facts.items())
    row = {"device": bench.name, "op": "facts", "impl": sys.platform, "d": 0, "note": note}
    bench.record.append({**row, "when": time.strftime("%Y-%m-%d %H:%M"), "code": _code()})


def _code() -> str | None:
    """When this version was committed, if that is known."""
    command = ["git", "log", "-1", "--format=%cd", "--date=format:%Y-%m-%d %H:%M"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except OSError:
        return None
    return told.strip() or None


def time_rates(bench: Bench, d: int) -> None:
    """A copy, a norm, a launch and a wait."""
    source, target = torch.ones(d, device=bench.device), torch.empty(d, device=bench.device)
    bench.time("copy", "torch", d, lambda: target.copy_(source))
    bench.time("norm", "torch", d, lambda: torch.linalg.vector_norm(source))
    one = source[0]
    bench.time("launch", "torch", d, lambda: one.add_(1.0))
    bench.time("wait", "torch", d, one.item)
