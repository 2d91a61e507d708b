"""Whether there are kernels for a GPU, and what those of several algorithms share."""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hvd_sketch.errors import ConfigurationError

_OLDEST_TRITON = (3, 3)


@functools.cache
def available() -> bool:
    """Whether Triton is there for a GPU of CUDA; if not, the first call logs a warning. Imports Triton if it is."""
    if torch.version.hip is not None:
        missing = "the kernels are for GPUs of NVIDIA, and were never tried on others"
    elif importlib.util.find_spec("triton") is None or _version("triton") < _OLDEST_TRITON:
        missing = (
            "Triton 3.3 or newer is not installed. PyTorch 2.7 for CUDA and newer ones bring it; or run "
            "`pip install 'triton>=3.3,<4'`"
        )
    else:
        return True
    logging.getLogger(__name__).warning(
        "hvd_sketch: the reference serves on the GPU, many times slower and with memory for several vectors: %s",
        missing,
    )
    return False


def serves(tensor: Tensor) -> bool:
    """Whether kernels can work on this tensor: it is on a GPU, and they are available."""
    return tensor.device.type == "cuda" and available()


def refuse_capture(device: torch.device) -> None:
    """Refuse to be recorded in a CUDA graph by the caller.

    Raises:
        ConfigurationError: a graph would repeat one step's messages and numbers.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ConfigurationError(
            "an exchange of gradients cannot be captured in a CUDA graph: every step has messages and numbers of its "
            "own; capture forward and backward, and call optimizer.step() after the replay"
        )


class InOrder:
    """Work that is begun on several streams of a device, in order, as if it were on one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: torch.cuda.Stream | None = None

    def here(self) -> None:
        """What follows on the current stream waits for all that came before a call of this on any stream."""
        if self._device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != stream:
            stream.wait_stream(self._last)
        self._last = stream


Places = Sequence[tuple[int, int]]
"""Where stretches of a vector start and stop."""


def pieces_of(places: Places, most: int) -> list[tuple[int, int, int, int]]:
    """Cut stretches of a vector into pieces of at most so many coordinates, one for each program.

    Returns:
        of each piece the number of its stretch, how far in that it begins, and where it starts and stops.
    """
    return [
        (number, begin - start, begin, min(stop, begin + most))
        for number, (start, stop) in enumerate(places)
        for begin in range(start, stop, most)
    ]


class Addresses:
    """Tables of where tensors lie, on a device; copied there only when they are not as they were."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables: dict[object, tuple[list[int], Tensor]] = {}

    def __call__(self, name: object, addresses: list[int]) -> Tensor:
        """The table of that name."""
        told, table = self._tables.get(name, ([-1], None))
        if table is None or told != addresses:
            pinned = self._device.type == "cuda"
            on_host = torch.tensor(addresses, dtype=torch.int64, device="cpu", pin_memory=pinned)
            table = on_host.to(self._device, non_blocking=True)
            self._tables[name] = addresses, table
        return table


_recording = threading.Lock()


@contextmanager
def undisturbed() -> Iterator[None]:
    """One thread at a time, and no garbage collection: a graph that it frees would end a recording."""
    with _recording:
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


class Recorded:
    """A function of tensors whose launches on a GPU are recorded at its third call and replayed from then on.

    What the host does for some dozens of launches then takes the time of one. The function may depend on nothing but
    its arguments' values and on tensors that stay where they are, waits for nothing, and returns tensors; those are
    written to again by the next call. Elsewhere, and while the caller is recording, it is just called.
    """

    _WARM = 2

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], device: torch.device) -> None:
        self._function, self._device = function, device
        self._calls = 0 if device.type == "cuda" else -1
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """What the function returns."""
        if self._calls < 0 or torch.cuda.is_current_stream_capturing():
            return self._function(*arguments)
        self._calls += 1
        if self._calls <= self._WARM:
            return self._function(*arguments)
        if self._graph is None:
            self._graph = self._record(arguments)
        for kept, argument in zip(self._arguments, arguments, strict=True):
            kept.copy_(argument)
        self._graph.replay()
        return self._results

    def _record(self, arguments: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        self._arguments = [argument.clone() for argument in arguments]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with undisturbed(), torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._results = self._function(*self._arguments)
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        return graph


def find_digit(counts: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """The value that the rank-th largest has, by how often each value occurs, and its rank among equal ones.

    ``counts`` are integers of shape ``(lists, values)``; ``rank`` and the results are int64 of shape ``(lists, 1)``,
    ranks from 1. If there are fewer, the value is 0.
    """
    from_top = counts.flip(1).cumsum(1)
    place = torch.searchsorted(from_top, rank).clamp_(max=counts.shape[1] - 1)
    value = counts.shape[1] - 1 - place
    return value, rank - (from_top.gather(1, place) - counts.gather(1, value))


def _version(package: str) -> tuple[int, ...]:
    return tuple(map(int, importlib.import_module(package).__version__.split(".")[:2]))
