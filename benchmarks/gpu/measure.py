"""How a call is measured on a device."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # not exported by name
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.record import Record, Row

_CACHE_BYTES = 256 << 20
"""More than any second-level cache holds."""
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
_LONGEST = 16
"""Kernels that are named in a row."""
Call = Callable[[], object]


@dataclass
class Bench:
    """Where and how to measure, and where the rows go.

    Attributes:
        device: that of all tensors.
        record: takes the rows.
        seconds: about how long one measurement takes.
    """

    device: torch.device
    record: Record
    seconds: float = 0.25
    _copies: dict[int, float] = field(default_factory=dict)

    @cached_property
    def name(self) -> str:
        """The device's name."""
        return torch.cuda.get_device_name(self.device) if self._is_gpu else "cpu"

    def time(self, op: str, impl: str, d: int, function: Call, **more: object) -> None:
        """Measure a call and append its row; a call that fails leaves a row as well."""
        try:
            row = self._measured(d, function)
            row |= {} if row["runs"] == 1 else self._counts(function)
        except Exception as error:
            self.fail(op, impl, d, error)
            return
        self.record.append({"device": self.name, "op": op, "impl": impl, "d": d} | row | more)

    def fail(self, op: str, impl: str, d: int, error: BaseException) -> None:
        """Append what went wrong; a device that cannot go on raises again."""
        text = f"{type(error).__name__}: {error}"
        self.record.append({"device": self.name, "op": op, "impl": impl, "d": d, "failed": text[:2000]})
        if self._is_gpu and not isinstance(error, torch.OutOfMemoryError):
            torch.cuda.synchronize()
        self.free()

    def free(self) -> None:
        """Give back what measurements before this one have left."""
        gc.collect()
        if self._is_gpu:
            torch.cuda.empty_cache()

    def gradient(self, d: int, seed: int = 0) -> Tensor:
        """Log-normal magnitudes with random signs, as gradients have."""
        generator = torch.Generator(self.device).manual_seed(seed)
        values = torch.randn(d, device=self.device, generator=generator).mul_(1.5).exp_()
        return values.mul_(torch.randn(d, device=self.device, generator=generator)).mul_(1e-3)

    def copy_seconds(self, d: int) -> float:
        """The median time of a copy of d float32: two passes."""
        if d not in self._copies:
            source = torch.ones(d, device=self.device)
            target = torch.empty_like(source)
            self._copies[d] = self._repeat(lambda: target.copy_(source))[0]
        return self._copies[d]

    @property
    def _is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _measured(self, d: int, function: Call) -> Row:
        with self._peak() as peak:
            function()  # the first call may compile
        seconds, host, runs = self._repeat(function)
        copy = self.copy_seconds(d)
        row = {"seconds": seconds, "host_seconds": host, "runs": runs, "copy_seconds": copy}
        return row | {"passes": 2 * seconds / copy, "peak_bytes": peak[0]}

    def _repeat(self, function: Call) -> tuple[float, float, int]:
        """Medians of the device's seconds and of the host's, and of how many calls."""
        first = self._once(function)
        runs = int(min(50, max(3, self.seconds / max(first))))
        turns = [first] if max(first) > 10 * self.seconds else [self._once(function) for _ in range(runs)]
        device, host = (statistics.median(column) for column in zip(*turns, strict=True))
        return device, host, len(turns)

    @cached_property
    def _cache(self) -> Tensor:
        return torch.empty(_CACHE_BYTES, dtype=torch.uint8, device=self.device)

    def _once(self, function: Call) -> tuple[float, float]:
        if not self._is_gpu:
            begin = time.perf_counter()
            function()
            return (time.perf_counter() - begin,) * 2
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._cache.zero_()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        start.record()
        function()
        host = time.perf_counter() - begin
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3, host

    @contextlib.contextmanager
    def _peak(self) -> Iterator[list[int | None]]:
        """The most memory in use inside, without what the measurement itself holds."""
        peak: list[int | None] = [None]
        if self._is_gpu:
            held = self._cache.numel()
            torch.cuda.reset_peak_memory_stats()
        yield peak
        if self._is_gpu:
            torch.cuda.synchronize()
            peak[0] = torch.cuda.max_memory_allocated() - held

    def _counts(self, function: Call) -> Row:
        """How often a call waits for the device and how much it launches there."""
        if not self._is_gpu:
            return {}
        try:
            waits, launched = _profiled(function)
        except RuntimeError as error:
            return {"note": f"not profiled: {error}"}
        longest = sorted(launched.items(), key=lambda item: -item[1][1])[:_LONGEST]
        kernels = [[name[:60], number, round(micros, 1)] for name, (number, micros) in longest]
        launches = sum(number for number, _ in launched.values())
        busy = sum(micros for _, micros in launched.values()) / 1e6
        return {"waits": waits - self._own_waits, "launches": launches, "busy_seconds": busy, "kernels": kernels}

    @cached_property
    def _own_waits(self) -> int:
        """Those of the measurement itself."""
        return _profiled(lambda: None)[0]


def _profiled(function: Call) -> tuple[int, dict[str, tuple[int, float]]]:
    """Waits of the host, and of each kernel's name how often it was launched and its microseconds in all."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        function()
        torch.cuda.synchronize()
    events, launched = profiled.events(), dict[str, tuple[int, float]]()
    for event in events:
        if event.device_type == DeviceType.CUDA:
            number, micros = launched.get(event.name, (0, 0.0))
            launched[event.name] = number + 1, micros + event.time_range.elapsed_us()
    return sum(event.name in _WAITS for event in events), launched
