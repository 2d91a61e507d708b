"""States of tensors, numbers and strings, from one rank to all, at the cost of the state."""

from __future__ import annotations

import io
import json
import pickle
import zlib
from collections.abc import Iterable
from typing import Any

import numpy
import torch
from torch import Tensor

from hvd_sketch.comm.alike import check_alike
from hvd_sketch.comm.base import Communicator
from hvd_sketch.comm.copies import majority, thrice
from hvd_sketch.errors import ConfigurationError

_PIECE = 2**30
"""Bytes; MPI counts in C ints."""

_PLAIN = (bool, int, float, str, type(None))


def broadcast_state(comm: Communicator, state: Any, root: int, name: str) -> Any:
    """The root's state, on every rank; what others give is ignored. Tensors come to the host.

    Sends a text that says what there is, and then every tensor by itself, into the memory where it stays. Only
    tensors, numbers, strings and None, and lists, tuples and dicts of them can be sent.

    Raises:
        ConfigurationError: alike on all ranks, when the root's state has anything else.
        RankMismatchError: alike on all ranks, when it did not come alike to all.
    """
    tensors: list[Tensor] = []
    text = b""
    if comm.rank == root:
        try:
            text = json.dumps({"state": _plain(state, tensors)}).encode()
        except ConfigurationError as error:
            text = json.dumps({"problem": str(error)}).encode()
    told = json.loads(_broadcast_bytes(comm, text, root, name))
    if "problem" in told:
        raise ConfigurationError(f"{name}: {told['problem']}")
    received = _broadcast_tensors(comm, tensors, root, name)
    return state if comm.rank == root else _restored(told["state"], received)


def broadcast_pickled(comm: Communicator, value: Any, root: int, name: str) -> Any:
    """The root's value of any kind, on every rank: what is no tensor is pickled, and so trusts the root.

    Like `broadcast_state` otherwise.

    Raises:
        ConfigurationError: alike on all ranks, when it cannot be pickled.
    """
    tensors: list[Tensor] = []
    file, problem = io.BytesIO(), b""
    if comm.rank == root:
        try:
            _Pickler(file, tensors).dump(value)
        except Exception as error:
            problem = f"{name}: {type(error).__name__}: {error}".encode()
    problem = _broadcast_bytes(comm, problem, root, f"{name}.problem")
    if problem:
        raise ConfigurationError(problem.decode())
    text = _broadcast_bytes(comm, file.getvalue(), root, name)
    received = _broadcast_tensors(comm, tensors, root, name)
    return value if comm.rank == root else _Unpickler(io.BytesIO(text), received).load()


class _Pickler(pickle.Pickler):
    """Leaves tensors out, and lists them instead."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._tensors = tensors

    def persistent_id(self, value: Any) -> int | None:
        """The number of a tensor."""
        if type(value) is not Tensor or value.layout is not torch.strided or value.requires_grad:
            return None
        self._tensors.append(value)
        return len(self._tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        """The tensor of a number."""
        return self._tensors[number]


def _plain(value: Any, tensors: list[Tensor]) -> Any:
    """As JSON has it; a list stands for whatever JSON has not, and begins with what that is."""
    if isinstance(value, numpy.generic):
        value = value.item()
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor) and value.layout is torch.strided:
        tensors.append(value.detach())
        return ["tensor", len(tensors) - 1]
    if isinstance(value, dict):
        return ["dict", *([_plain(key, tensors), _plain(item, tensors)] for key, item in value.items())]
    if isinstance(value, list | tuple):
        return ["tuple" if isinstance(value, tuple) else "list", *(_plain(item, tensors) for item in value)]
    raise ConfigurationError(
        f"the state has a {type(value).__name__}, and only tensors, numbers, strings, None and lists, tuples and "
        "dicts of them are sent; broadcast it with broadcast_object, which pickles"
    )


def _restored(value: Any, tensors: list[Tensor]) -> Any:
    """What `_plain` was given."""
    if not isinstance(value, list):
        return value
    kind, *items = value
    if kind == "tensor":
        return tensors[items[0]]
    if kind == "dict":
        return {_restored(key, tensors): _restored(item, tensors) for key, item in items}
    restored = (_restored(item, tensors) for item in items)
    return tuple(restored) if kind == "tuple" else list(restored)


def _broadcast_tensors(comm: Communicator, tensors: Iterable[Tensor], root: int, name: str) -> list[Tensor]:
    """The root's tensors, on every rank, each in memory of its own there."""
    shapes = json.dumps([(str(tensor.dtype).removeprefix("torch."), tensor.shape) for tensor in tensors])
    told = json.loads(_broadcast_bytes(comm, shapes.encode(), root, f"{name}.shapes"))
    received, checksum = list(tensors), 0
    if comm.rank == root:
        for tensor in tensors:
            checksum = _broadcast_pieces(comm, tensor.cpu().contiguous(), root, name, checksum)
    for dtype, shape in told if comm.rank != root else ():
        received.append(torch.empty(shape, dtype=getattr(torch, dtype), device="cpu"))
        checksum = _broadcast_pieces(comm, received[-1], root, name, checksum)
    check_alike(comm, checksum, f"the tensors of {name}", name)
    return received


def _broadcast_pieces(comm: Communicator, whole: Tensor, root: int, name: str, checksum: int) -> int:
    """Of a contiguous tensor of the host, in place; the checksum of this and of what it is behind."""
    for piece in whole.reshape(-1).view(torch.uint8).split(_PIECE) if whole.numel() else ():
        comm.broadcast(piece, root, f"{name}.tensor")
        checksum = zlib.crc32(piece.numpy().data, checksum)
    return checksum


def _broadcast_bytes(comm: Communicator, text: bytes, root: int, name: str) -> bytes:
    lengths = thrice(torch.tensor([len(text)], dtype=torch.int64, device="cpu"))
    comm.broadcast(lengths, root, f"{name}.length")
    payload = torch.empty(*majority(lengths.tolist()), dtype=torch.uint8, device="cpu")
    if comm.rank == root and text:
        payload.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    check_alike(comm, _broadcast_pieces(comm, payload, root, f"{name}.text", 0), f"the text of {name}", name)
    return payload.numpy().tobytes()
