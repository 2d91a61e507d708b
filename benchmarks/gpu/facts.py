"""What the device and its software are, and the rates that all other numbers are held against."""

from __future__ import annotations

import platform
import sys
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
    bench.record.append({"device": bench.name, "op": "facts", "impl": sys.platform, "d": 0, "note": note})


def time_rates(bench: Bench, d: int) -> None:
    """A copy, a norm, a launch and a wait."""
    source, target = torch.ones(d, device=bench.device), torch.empty(d, device=bench.device)
    bench.time("copy", "torch", d, lambda: target.copy_(source))
    bench.time("norm", "torch", d, lambda: torch.linalg.vector_norm(source))
    one = source[0]
    bench.time("launch", "torch", d, lambda: one.add_(1.0))
    bench.time("wait", "torch", d, one.item)
