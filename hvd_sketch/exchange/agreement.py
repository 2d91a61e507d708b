"""Whether all ranks train the same thing, and what to tell every one of them when they do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from hvd_sketch import wire
from hvd_sketch.comm.base import Communicator
from hvd_sketch.errors import RankMismatchError

Answers = Mapping[str, str]


_START = (
    "Give every rank the same model, compression settings and seed; load a saved memory that fits on all, on none, or "
    "on rank 0 alone; call broadcast_optimizer_state and then broadcast_parameters before the first step."
)


def agree(
    comm: Communicator,
    answers: Answers,
    settle: Callable[[Sequence[Answers]], bool] = lambda told: False,
) -> int:
    """How many ranks took part and gave the same answers: sums 47 floats, if they are the same.

    Whatever a rank trains with, its collectives are called the same here, or ranks that differ in that would wait.

    Args:
        comm: the ranks.
        answers: of this rank, by question.
        settle: given the answers of all ranks where they differ; whether it has removed the difference, alike on all.

    Raises:
        RankMismatchError: alike on all ranks, when they differ, with what differs.
    """
    message = torch.empty(wire.HEADER, dtype=torch.float32, device="cpu")
    wire.write_header(message)
    content = torch.frombuffer(bytearray(repr(answers).encode()), dtype=torch.uint8)
    wire.write_digest(message[wire.DIGEST], content)
    comm.allreduce(message, f"hvd_sketch.{comm.group}.agree")
    header = wire.read_header(message)
    if not header.agreed:
        gathered = comm.allgather_object(dict(answers), f"hvd_sketch.{comm.group}.differences")
        told = [told or next(filter(None, gathered)) for told in gathered]  # a rank that has joined differs from none
        if not settle(told):
            raise RankMismatchError(differences(gathered, "the ranks disagree, and nothing was exchanged", _START))
    return round(header.present)


def newcomers(told: Sequence[Answers], question: str, new: str) -> list[int]:
    """Ranks that answer this one question with ``new`` where all others answer alike; none if more differs."""
    ranks = [rank for rank, answers in enumerate(told) if answers.get(question) == new]
    known = {answers.get(question) for answers in told} - {new}
    rest = {tuple(answer for key, answer in answers.items() if key != question) for answers in told}
    return ranks if len(known) == len(rest) == 1 else []


def differences(answers: Sequence[Answers | None], what: str, remedy: str) -> str:
    """Where answers differ from those of the first rank that gave any; who has joined gives none. An error's text."""
    told = {rank: each for rank, each in enumerate(answers) if each}
    first = min(told)
    lines = [f"hvd_sketch: {what}:"]
    for key, expected in told[first].items():
        for rank, each in told.items():
            answer = each.get(key, "")
            if answer != expected:
                ours = sorted(set(expected.split()) - set(answer.split()))
                theirs = sorted(set(answer.split()) - set(expected.split()))
                lines.append(
                    f"  {key}: rank {first} has {' '.join(ours[:5])!r}, rank {rank} has {' '.join(theirs[:5])!r}"
                )
    return "\n".join([*lines, remedy])
