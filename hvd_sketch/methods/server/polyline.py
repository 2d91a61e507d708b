"""Polyline: numbers as text of a fixed number of decimal digits, short where neighbours are alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.methods.server.codes import Code
from hvd_sketch.settings import check_numbers

_BITS = 5  # of a group
_MORE = 32  # added to every group of a number but the last
_FIRST = 63  # the character of group 0
_GROUPS = 13  # of the largest number, 64 bits
_BOUNDS = np.uint64(1) << np.arange(_BITS, 64, _BITS, dtype=np.uint64)
"""From its n-th bound on a number takes n + 1 groups."""
_LIMIT = 2.0**62


@dataclass(frozen=True)
class Polyline:
    """The code of FedAT, taken from the paths of map services.

    With p decimal digits, for the values w_i one after the other::

        q_i = round(10^p w_i), halves to even       d_i = q_i - q_(i-1), q_0 = 0
        z_i = 2 d_i, or -2 d_i - 1 if d_i < 0

    z is cut into groups of five bits, the lowest first; each is one ASCII character, 63 + group, and
    32 more if another follows. The error of a value is at most ``10^-p / 2``: differences are taken of
    rounded integers, so it does not add up. What it cuts off stays in the sender's memory.
    Sent: for Gaussian values of standard deviation 0.05 and p = 4 about 2.5 bytes a value.
    Source: Chai et al., "FedAT" (SC 2021), arXiv 2010.05958.

    Args:
        precision: p, from 0 to 12.
    """

    precision: int = 4

    def __post_init__(self) -> None:
        check_numbers(self)
        if not 0 <= self.precision <= 12:
            raise ConfigurationError(f"Polyline precision must be from 0 to 12 digits, got {self.precision}")

    def encode(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
        """The text of some values.

        Raises:
            ValueError: for a value that is not finite, or of 2^62 or more in units of the last digit.
        """
        scaled = np.rint(values * 10.0**self.precision)
        if not (np.abs(scaled) < _LIMIT).all():
            raise ValueError(f"polyline: values must be finite and below {_LIMIT / 10.0**self.precision:.3g}")
        integers = np.concatenate([[0], scaled]).astype(np.int64)
        steps = integers[1:] - integers[:-1]
        zigzag = ((steps << 1) ^ (steps >> 63)).view(np.uint64)
        groups = 1 + np.searchsorted(_BOUNDS, zigzag, side="right")
        stops = np.cumsum(groups)
        text = np.empty(stops[-1] if len(stops) else 0, np.uint8)
        for number in range(groups.max(initial=0)):
            longer = groups > number
            bits = (zigzag[longer] >> np.uint64(_BITS * number)).astype(np.uint8) & (_MORE - 1)
            more = _MORE * (groups[longer] > number + 1)
            text[stops[longer] - groups[longer] + number] = bits + more + _FIRST
        return text

    def decode(self, text: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        """The rounded values behind a text.

        Raises:
            ValueError: when no numbers are written like this.
        """
        if not text.size:
            return np.empty(0)
        groups = text - np.uint8(_FIRST)  # wraps round below the first character
        last = groups < _MORE
        if (groups >= 2 * _MORE).any() or not last[-1]:
            raise ValueError("polyline: characters outside of the code, or a number cut off")
        starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
        lengths = np.diff(starts, append=text.size)
        place = np.arange(text.size) - np.repeat(starts, lengths)
        if lengths.max() > _GROUPS or (groups[place == _GROUPS - 1] > 15).any():
            raise ValueError("polyline: a number of more than 64 bits")
        bits = (groups & (_MORE - 1)).astype(np.uint64) << (_BITS * place).astype(np.uint64)
        zigzag = np.bitwise_or.reduceat(bits, starts)
        steps = (zigzag >> np.uint64(1)).view(np.int64) ^ -(zigzag & np.uint64(1)).view(np.int64)
        return np.cumsum(steps) / 10.0**self.precision


class PolylineCode(Code):
    """Vectors as the text of a `Polyline`."""

    number = 4

    def __init__(self, polyline: Polyline, count: int) -> None:
        self._polyline, self._count = polyline, count

    def encode(self, vector: Tensor, step: int) -> Tensor:
        text = self._polyline.encode(vector.double().numpy())
        vector.sub_(torch.from_numpy(self._polyline.decode(text)))
        return torch.from_numpy(text)

    def add(self, payload: Tensor, vector: Tensor) -> None:
        values = self._polyline.decode(payload.numpy())
        if len(values) != self._count:
            raise ValueError(f"{len(values)} values, {self._count} are expected")
        vector.add_(torch.from_numpy(values))

    @property
    def most_bytes(self) -> int:
        return _GROUPS * self._count
