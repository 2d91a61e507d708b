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
from torch.nn.parameter import is_lazy

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.shards import is_sharded, local

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
    the layout is the same on every rank. ``cuts`` are the offsets at which it is cut into buckets, if
    need be within a parameter.
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
        """The positions of the slots that begin in a part of the vector."""
        starts = [slot.offset for slot in self.slots]
        return slice(bisect_left(starts, where.start), bisect_left(starts, where.stop))

    @classmethod
    def of(cls, named_parameters: Iterable[tuple[str, Tensor]], is_dense: DensePredicate, buckets: int = 1) -> Layout:
        """Lay out the given parameters.

        With ``buckets`` above one, compressed parameters that are given last come first, for their gradients are
        ready first; their order must then be the same on all ranks. Buckets have about the same size, and end
        with a parameter where one ends near by.

        Raises:
            ConfigurationError: for an empty list, a duplicate name, a dtype that is complex or integer, or a
                parameter that is lazy, on the meta device, or a DTensor.
        """
        given = list(named_parameters)
        named = sorted(given, key=lambda item: item[0])
        _check(named)
        dense = {name: is_dense(name, parameter) or parameter.numel() == 0 for name, parameter in named}
        slots: list[Slot] = []
        for part, ordered in ((False, reversed(given) if buckets > 1 else named), (True, named)):
            for name, parameter in ordered:
                if dense[name] is part:
                    offset = slots[-1].stop if slots else 0
                    slots.append(Slot(name, tuple(parameter.shape), offset, parameter.numel()))
        compressed = sum(slot.numel for slot in slots if not dense[slot.name])
        return cls(tuple(slots), compressed, slots[-1].stop, _cuts(slots, compressed, buckets))

    def index(self) -> dict[str, int]:
        """The position of each name in ``slots``."""
        return {slot.name: position for position, slot in enumerate(self.slots)}

    def describe(self) -> str:
        """Names and shapes, in order: ``"bias[10] weight[10x20]"``."""
        return " ".join(f"{slot.name}[{'x'.join(map(str, slot.shape))}]" for slot in self.slots)

    def fingerprint(self) -> int:
        """A checksum of names and shapes, in order, and of the cuts if there are any."""
        named = repr([(slot.name, slot.shape) for slot in self.slots])
        return zlib.crc32((named + repr(self.cuts) if self.cuts else named).encode())


def describe_values(parameters: Mapping[str, Tensor]) -> str:
    """A checksum of each parameter's values, by name: equal text on ranks that hold the same bits."""
    return " ".join(f"{name}={_checksum(parameters[name]):08x}" for name in sorted(parameters))


def _check_is_there(name: str, parameter: Tensor) -> None:
    """Its values are all in this process's memory."""
    if is_lazy(parameter):
        raise ConfigurationError(
            f"parameter {name!r} is lazy and has no shape yet; run one batch through the model before wrapping"
        )
    if parameter.is_meta:
        raise ConfigurationError(
            f"parameter {name!r} is on the meta device and has no values; give the model a device with "
            "model.to_empty(device=…) and initialise it, or load its weights, before wrapping"
        )
    if is_sharded(parameter):
        raise ConfigurationError(
            f"parameter {name!r} is a DTensor, of which this process has a part only (FSDP2, tensor parallel); "
            "wrap a model that every rank holds whole; DistributedOptimizer takes shards, to exchange with replicas"
        )


def _cuts(slots: Sequence[Slot], compressed: int, buckets: int) -> tuple[int, ...]:
    """Where to cut the compressed coordinates into so many parts: evenly, but at a slot's edge a quarter part away."""

    def settle(even: int) -> int:
        edge = min((slot.offset for slot in slots), key=lambda edge: abs(edge - even))
        return edge if abs(edge - even) <= compressed / buckets / 4 else even

    cuts = {settle(compressed * number // buckets) for number in range(1, buckets)}
    return tuple(sorted(cuts - {0, compressed}))


def _checksum(parameter: Tensor) -> int:
    values = local(parameter).detach().cpu().contiguous().reshape(-1)
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
        _check_is_there(name, parameter)
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
