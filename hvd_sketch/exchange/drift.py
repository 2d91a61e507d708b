"""Whether the ranks still hold the same: a digest of it rides in the header of every step."""

from __future__ import annotations

import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from hvd_sketch import wire
from hvd_sketch.comm.base import Communicator
from hvd_sketch.errors import RankMismatchError
from hvd_sketch.exchange.agreement import Answers, differences
from hvd_sketch.layout import Layout
from hvd_sketch.shards import local

PERIOD = 100
"""Steps in which every parameter is looked at once."""

Groups = Sequence[Mapping[str, Any]]

_REMEDY = (
    "Numbers and sizes: let a scheduler see what all ranks see, such as the mean of their losses. Parameters: change "
    "them alike on all ranks, and train on processors of one kind with one build of PyTorch. Otherwise a message was "
    "damaged, or a kernel differs. Go on from a checkpoint, or from broadcast_optimizer_state and then "
    "broadcast_parameters."
)
_MISSED = "steps missed inside join()"
_STEP_ALIKE = (
    "Ranks have missed steps inside join(), and with them those of a scheduler that is stepped by batch: step it by "
    "epoch, after the loop, or there as often on every rank. "
)


class Drift:
    """What must be equal on all ranks before a step, and what to tell them if it is not.

    In the digest of step t are the update of the step before, or what it was computed from, the numbers of the
    optimizer's groups that the step will be made with, the ``t mod 100``-th hundredth of the parameters, what an
    algorithm keeps in common, and the sizes that a schedule gives its messages. It costs one pass over these, waits
    for no device, and is 32 lanes of a message that is sent anyway.

    Args:
        layout: of the parameters.

    Attributes:
        parameters: those to look at, in the layout's order; none to look at none.
        groups: the optimizer's.
        samples: whether to look at parameters at all.
        describe_values: a checksum of each parameter, by name.
        missed: steps that others have taken, and this rank has joined without data.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._offsets = [slot.offset for slot in layout.slots]
        self.parameters: Sequence[Tensor] = ()
        self.samples = True
        self.groups: Callable[[], Groups] = tuple
        self.describe_values: Callable[[], str] = str
        self._noted: list[Tensor] = []
        self._state: Any = None
        self._sizes = ""
        self.step = self.missed = 0

    def forget(self) -> None:
        """Compare nothing of the steps so far."""
        self._noted = []

    def note_update(self, *contents: Tensor) -> None:
        """The update of a step; what was noted of the one before is forgotten."""
        self._noted = [wire.fold(content) for content in contents]

    def note(self, content: Tensor) -> None:
        """What else all ranks received alike since then."""
        self._noted.append(wire.fold(content))

    def lanes(self, step: int, state: Any, sizes: str, device: torch.device) -> Tensor:
        """The digest for the header of a step; ``state`` is what the algorithm keeps in common, ``sizes`` its plan."""
        self.step, self._state, self._sizes = step, state, sizes
        tensors, text = _taken_apart([state, sizes, _numbers(self.groups())])
        parts = [*self._noted, *map(wire.words, tensors), *map(wire.words, self._sample(step))]
        begin = torch.zeros(1, dtype=torch.int32, device=device)  # content also where there is none
        content = torch.cat([begin, *(part.to(device, non_blocking=True) for part in parts)])
        lanes = torch.empty(wire.DIGEST_BITS, dtype=torch.float32, device=device)
        wire.write_digest(lanes, wire.fold(content), zlib.crc32(text.encode()))
        return lanes

    def tell(self, comm: Communicator, name: Callable[[str], str]) -> RankMismatchError:
        """Collective, when the digests differ: the error to raise on all ranks."""
        told = comm.allgather_object(dict(self._answers()), name("drift"))
        what = f"before step {self.step} the ranks have drifted apart, and the step was not taken"
        uneven = len({answers[_MISSED] for answers in told if answers}) > 1
        return RankMismatchError(differences(told, what, _STEP_ALIKE + _REMEDY if uneven else _REMEDY))

    def _answers(self) -> Answers:
        numbers, (tensors, text) = _numbers(self.groups()), _taken_apart(self._state)
        noted = " ".join(f"{_checksum(part):08x}" for part in self._noted)
        state = " ".join([f"{zlib.crc32(text.encode()):08x}", *(f"{_checksum(part):08x}" for part in tensors)])
        return {
            "numbers": " ".join(f"{key}={_plain(value)}" for key, value in numbers.items()),
            "parameters": self.describe_values() if self.samples else "",
            f"update of step {self.step - 1}": noted,
            "state": state,
            "sizes of messages": self._sizes.replace(" ", ""),
            _MISSED: str(self.missed),
        }

    def _sample(self, step: int) -> Iterator[Tensor]:
        """A hundredth of the parameters, another one in each of a hundred steps."""
        if not (self.parameters and self.samples):
            return
        start, stop = (self._layout.total * (step % PERIOD + edge) // PERIOD for edge in (0, 1))
        first = max(0, bisect_right(self._offsets, start) - 1)
        for at in range(first, bisect_left(self._offsets, stop, first)):
            offset = self._offsets[at]
            yield local(self.parameters[at]).detach().reshape(-1)[max(0, start - offset) : stop - offset]


def _numbers(groups: Groups) -> dict[str, Any]:
    """Whatever counts in the groups of an optimizer."""
    return {
        f"group{at}.{key}": value
        for at, group in enumerate(groups)
        for key, value in sorted(group.items())
        if isinstance(value, Number | Tensor) or (isinstance(value, tuple) and key != "params")
    }


def _taken_apart(value: Any) -> tuple[list[Tensor], str]:
    """The tensors in dicts, lists and tuples, and everything else as text."""
    if isinstance(value, Tensor):
        return [value], "tensor"
    if isinstance(value, Mapping):
        return _taken_apart([list(value), list(value.values())])
    if not isinstance(value, list | tuple):
        return [], repr(value)
    parts = [_taken_apart(item) for item in value]
    return [tensor for tensors, _ in parts for tensor in tensors], f"[{','.join(text for _, text in parts)}]"


def _plain(value: Any) -> str:
    """Without spaces."""
    return repr(value.tolist() if isinstance(value, Tensor) else value).replace(" ", "")


def _checksum(content: Tensor) -> int:
    return zlib.crc32(wire.words(content).cpu().numpy().tobytes())
