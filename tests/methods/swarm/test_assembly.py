"""Means by messages when the rank that adds up dies after it has told only some of the others the result."""

import threading
from collections import deque

import pytest
import torch
from torch import Tensor

from hvd_sketch.comm.buffers import Buffers
from hvd_sketch.methods.swarm.assembly import Assembly
from hvd_sketch.methods.swarm.message import Header, Kind
from hvd_sketch.methods.swarm.peers import Peers

SIZE = 3
TIMEOUT = 20.0


class Member:
    """One of three nodes; what it sends waits until the test delivers it."""

    def __init__(self, rank: int) -> None:
        self.last_heard = [0.0] * SIZE
        self.failure: BaseException | None = None
        self.sent: deque[tuple[int, Tensor]] = deque()
        self.means: list[float] = []
        self.condition, self.rank, buffers = threading.Condition(), rank, Buffers()
        self.peers = Peers(self, buffers, self.condition, rank, SIZE, patience=600.0, on_lost="continue")
        self.assembly = Assembly(self, self.peers, buffers, self.condition)

    def send(self, to: int, message: Tensor) -> None:
        self.sent.append((to, message.clone()))

    def begin(self) -> threading.Thread:
        """Its next mean, of its rank."""
        thread = threading.Thread(target=self._take_part, daemon=True)
        thread.start()
        return thread

    def _take_part(self) -> None:
        vector = torch.full((2,), float(self.rank))
        self.assembly.mean(vector)
        self.means.append(float(vector[0]))

    def loses(self, rank: int) -> None:
        with self.condition:
            self.peers.lost.add(rank)
            self.condition.notify_all()


def deliver(members: list[Member], *, until: threading.Thread, but: frozenset[int] = frozenset()) -> None:
    """Carry messages among all members ``but`` some, whose messages are lost, until a thread has ended."""
    while until.is_alive():
        for member in members:
            while member.sent:
                to, message = member.sent.popleft()
                if member.rank not in but and to not in but:
                    receive(members[to], member.rank, message)
        until.join(0.001)


def receive(member: Member, source: int, message: Tensor) -> None:
    with member.condition:
        member.assembly.receive(source, Header.read(message), message, torch.float32)
        member.condition.notify_all()


@pytest.mark.timeout(TIMEOUT)
@pytest.mark.parametrize("told", [1, 2])
@pytest.mark.parametrize("ahead", [False, True])
def test_what_a_dead_rank_told_some_of_the_others_all_of_them_learn(told: int, ahead: bool) -> None:
    """Ahead: who was told is at the next mean already, and was asked for the last one before it was told."""
    members = [Member(rank) for rank in range(SIZE)]
    untold = 3 - told
    threads = [member.begin() for member in members]
    for rank in (1, 2):
        while not members[rank].sent:
            pass
        receive(members[0], rank, members[rank].sent.popleft()[1])
    threads[0].join(TIMEOUT)
    last_words = {to: message for to, message in members[0].sent if Header.read(message).kind == Kind.MEAN}
    dead = frozenset({0})
    if ahead:
        members[untold].loses(0)
        while told > untold and not members[untold].sent:
            pass
        while members[untold].sent:
            to, message = members[untold].sent.popleft()
            receive(members[to], untold, message)
    receive(members[told], 0, last_words[told])
    threads[told].join(TIMEOUT)
    members[told].loses(0)
    members[untold].loses(0)
    if ahead:
        threads[told] = members[told].begin()
        deliver(members, until=threads[untold], but=dead)
        threads[untold] = members[untold].begin()
        deliver(members, until=threads[told], but=dead)
    deliver(members, until=threads[untold], but=dead)
    assert members[untold].means == members[told].means == ([1.0, 1.5] if ahead else [1.0])
