"""The whole gradient as one vector: which coordinates belong to which parameter."""

from __future__ import annotations

import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise

import torch
from torch import Tensor

from hvd_sketch.errors import ConfigurationError

DensePredicate = Callable[[str, Tensor], bool]
"""Decides by name and parameter whether a tensor is sent whole in every step."""

_FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def small_or_named(dense_below: int, exclude: Sequence[str] = ()) -> DensePredicate:
    """The usual rule: 1-D tensors, tensors below ``dense_below`` elements, and names that match.

    Args:
        dense_below: smallest number of elements worth compressing; 0 for all tensors, 1-D ones as well.
        exclude: shell-style patterns of parameter names, as in ``"*.embedding.weight"``.
    """

    def is_dense(name: str, parameter: Tensor) -> bool:
        named = any(fnmatchcase(name, pattern) for pattern in exclude)
        return named or (parameter.dim() <= 1 and dense_below > 0) or parameter.numel() < dense_below

    return is_dense


@dataclass(frozen=True)
class Slot:
    """The place of one parameter in the vector."""

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int

    @property
    def stop(self) -> int:
        return self.offset + self.numel


@dataclass(frozen=True)
class Layout:
    """The vector of all parameters: compressed coordinates first, the dense ones behind them.

    Within each part parameters are ordered by name, never by the order in which hooks fire, so
    the layout is the same on every rank. ``cuts`` are the offsets at which it is cut into buckets.
    """

    slots: tuple[Slot, ...]
    compressed: int
    total: int
    cuts: tuple[int, ...] = ()

    @property
    def dense(self) -> int:
        """Coordinates sent whole in every step."""
        return self.total - self.compressed

    @property
    def buckets(self) -> tuple[slice, ...]:
        """The parts of the vector, in the order of their exchange; the last one ends with the dense coordinates."""
        return tuple(slice(start, stop) for start, stop in pairwise((0, *self.cuts, self.total)))

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many compressed coordinates each bucket has."""
        return tuple(min(where.stop, self.compressed) - where.start for where in self.buckets)

    def positions(self, where: slice) -> slice:
        """The positions of the slots inside a part of the vector."""
        starts = [slot.offset for slot in self.slots]
        return slice(bisect_left(starts, where.start), bisect_left(starts, where.stop))

    @classmethod
    def of(cls, named_parameters: Iterable[tuple[str, Tensor]], is_dense: DensePredicate, buckets: int = 1) -> Layout:
        """Lay out the given parameters.

        With ``buckets`` above one, those given last come first, for their gradients are ready first: whole
        parameters, in groups of about the same number of compressed coordinates. Their order must then be
        the same on all ranks.

        Raises:
            ConfigurationError: for an empty list, a duplicate name, or a dtype that is complex
                or integer.
        """
        given = list(named_parameters)
        named = sorted(given, key=lambda item: item[0])
        _check(named)
        dense = {name: is_dense(name, parameter) or parameter.numel() == 0 for name, parameter in named}
        groups = _group([item for item in reversed(given) if not dense[item[0]]], buckets)
        slots: list[Slot] = []
        stops = [0]
        for group in (*groups, [item for item in named if dense[item[0]]]):
            for name, parameter in sorted(group, key=lambda item: item[0]):
                offset = slots[-1].stop if slots else 0
                slots.append(Slot(name, tuple(parameter.shape), offset, parameter.numel()))
            stops.append(slots[-1].stop if slots else 0)
        return cls(tuple(slots), stops[-2], stops[-1], tuple(stops[1:-2]))

    def index(self) -> dict[str, int]:
        """The position of each name in ``slots``."""
        return {slot.name: position for position, slot in enumerate(self.slots)}

    def describe(self) -> str:
        """Names and shapes, in order: ``"bias[10] weight[10x20]"``."""
        return " ".join(f"{slot.name}[{'x'.join(map(str, slot.shape))}]" for slot in self.slots)

    def fingerprint(self) -> int:
        """A checksum of names and shapes, in order."""
        return zlib.crc32(repr([(slot.name, slot.shape) for slot in self.slots]).encode())


def describe_values(parameters: Mapping[str, Tensor]) -> str:
    """A checksum of each parameter's values, by name: equal text on ranks that hold the same bits."""
    return " ".join(f"{name}={_checksum(parameters[name]):08x}" for name in sorted(parameters))


def _group(named: Sequence[tuple[str, Tensor]], buckets: int) -> list[list[tuple[str, Tensor]]]:
    """Cut a list of parameters into at most so many runs of about the same number of elements."""
    total, before = sum(parameter.numel() for _, parameter in named), 0
    groups: dict[int, list[tuple[str, Tensor]]] = {}
    for name, parameter in named:
        middle = before + parameter.numel() / 2
        groups.setdefault(int(middle * buckets / total), []).append((name, parameter))
        before += parameter.numel()
    return list(groups.values())


def _checksum(parameter: Tensor) -> int:
    values = parameter.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(values.view(torch.uint8).numpy().data) if values.numel() else 0


def _check(named: Sequence[tuple[str, Tensor]]) -> None:
    if not named:
        raise ConfigurationError("named_parameters is empty: there is nothing to train or to compress")
    for (name, _), (following, _) in pairwise(named):
        if name == following:
            raise ConfigurationError(
                f"parameter name {name!r} occurs more than once in named_parameters; "
                "prefix the names of each model so that they differ"
            )
    for name, parameter in named:
        if parameter.dtype not in _FLOATING:
            raise ConfigurationError(
                f"parameter {name!r} has dtype {parameter.dtype}; only real floating point can be compressed: "
                "train it with an optimizer of its own"
            )
    devices = {parameter.device for _, parameter in named}
    if len(devices) > 1:
        raise ConfigurationError(
            f"parameters live on several devices ({', '.join(sorted(map(str, devices)))}); "
            "use one DistributedOptimizer for each device"
        )
