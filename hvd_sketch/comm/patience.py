"""How long a rank waits for the others."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from hvd_sketch.errors import ConfigurationError

VARIABLE = "HVD_SKETCH_TIMEOUT"

_DEFAULT = 1800.0  # what torch.distributed has for Gloo and MPI
_LOOK = 1e-3
_EAGER = 1.0  # seconds of asking without a pause
_PAUSE = 1e-4
_thread = threading.local()


def limit_of(timeout: float | None) -> float:
    """Seconds until a rank gives up to wait for others: what was given, the environment's, or half an hour.

    Raises:
        ConfigurationError: for anything but a positive number.
    """
    given, name = (os.environ.get(VARIABLE, _DEFAULT), VARIABLE) if timeout is None else (timeout, "timeout")
    try:
        limit = float(given)
    except ValueError:
        limit = math.nan
    if not limit > 0.0:
        raise ConfigurationError(f"{name} must be a positive number of seconds, got {given!r}")
    return limit


@contextmanager
def unhurried() -> Iterator[None]:
    """Inside, waits of this thread leave the processor to others: it runs beside one that computes."""
    _thread.pauses = True
    try:
        yield
    finally:
        _thread.pauses = False


def wait_until(done: Callable[[], bool], look: Callable[[float], None], limit: float) -> bool:
    """Ask whether it is ``done()`` until it is; False after ``limit`` seconds.

    At first without a pause, unless `unhurried`, for what others compute comes any moment; after a second the
    processor is left to others. Every millisecond ``look`` is told which share of the limit has passed, and may raise.
    """
    began = looked = time.monotonic()
    pauses = getattr(_thread, "pauses", False)
    while not done():
        if pauses:
            time.sleep(_PAUSE)
        now = time.monotonic()
        if now - looked >= _LOOK:
            looked = now
            look((now - began) / limit)
            if now - began >= limit:
                return done()
            if now - began >= _EAGER:
                time.sleep(_PAUSE)
    return True


def ranks(numbers: Collection[int]) -> str:
    """Some ranks in words, the first ten of them."""
    named = ", ".join(map(str, sorted(numbers)[:10]))
    more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {named}{more}"
