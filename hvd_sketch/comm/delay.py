"""How long a message is on its way, whatever its size: measured once, and agreed on."""

from __future__ import annotations

import math
import os
import socket
import statistics
import time
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from hvd_sketch.comm.patience import ranks
from hvd_sketch.errors import ConfigurationError

VARIABLE = "HVD_SKETCH_CROSSING"

NOTABLE = 4e-3
"""Seconds: what takes longer is a way between places, and not what a busy machine makes of one within a room."""

_NAME = "hvd_sketch.crossing"
_SAMPLES = 10
_NOT_GIVEN = -1.0


def agreed_crossing(alltoall: Callable[[Tensor, str], Tensor], size: int) -> float:
    """Seconds from one's own messages to all until theirs are here, the same number on all ranks; collective.

    That is a delay where messages just leave, as over MPI, and two where the receiver has to be ready, as over Gloo.

    It is the largest that any rank's environment gives in ``HVD_SKETCH_CROSSING``. Where none gives one it is 0 if
    all ranks are on one host, and else the largest of the ranks' medians over ten alltoalls of 8 bytes to each rank.
    Ranks leave one alltoall apart by what they are late in the next: of two in a row, the mean is the delay.

    Raises:
        ConfigurationError: alike on all ranks, for a variable that is no number of seconds on one of them.
    """
    given = _given()
    message = torch.zeros(size, 1, dtype=torch.float64, device="cpu")
    samples = [_timed(alltoall, message) for _ in range(_SAMPLES)]
    own = [statistics.median(samples), given, float(zlib.crc32(socket.gethostname().encode()))]
    told = alltoall(torch.tensor([own] * size, dtype=torch.float64, device="cpu"), _NAME)
    medians, fixed, hosts = told.unbind(1)
    if bool(fixed.isnan().any()):
        wrong = ranks(fixed.isnan().nonzero().flatten().tolist())
        raise ConfigurationError(f"{VARIABLE} must be a number of seconds, 0 or more, and is none on {wrong}")
    if float(fixed.max()) != _NOT_GIVEN:
        return float(fixed.max())
    return 0.0 if bool((hosts == hosts[0]).all()) else float(medians.max())


def _timed(alltoall: Callable[[Tensor, str], Tensor], message: Tensor) -> float:
    began = time.perf_counter()
    alltoall(message, _NAME)
    return time.perf_counter() - began


def _given() -> float:
    """The environment's seconds; not a number where they are none."""
    text = os.environ.get(VARIABLE)
    if text is None:
        return _NOT_GIVEN
    try:
        seconds = float(text)
    except ValueError:
        return math.nan
    return seconds if 0.0 <= seconds < math.inf else math.nan
