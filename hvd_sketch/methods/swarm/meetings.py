"""Which meeting happens when: offers, answers, crossings, and what waits for the end of a block."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from hvd_sketch.methods.swarm.message import Header, Kind, kind_of
from hvd_sketch.methods.swarm.node import Node, Offer
from hvd_sketch.methods.swarm.peers import Peers, Post
from hvd_sketch.stats import Stats


class Meeting(NamedTuple):
    """One finished meeting as one of its two nodes saw it.

    Attributes:
        partner: the other rank.
        begun_here: whether this rank chose the other.
        began: when it was begun (here) or taken up (there), ``time.time()``.
        ended: when this rank's model had moved.
        step: local steps that this rank's main thread had finished by then.
        bits: of the code, 0 for full precision.
    """

    partner: int
    begun_here: bool
    began: float
    ended: float
    step: int
    bits: int


@dataclass
class SwarmStats(Stats):
    """Counters of one node; ``bytes_sent`` are the bytes of all its messages.

    Attributes:
        meetings: begun by this node and finished.
        visits: begun by a neighbour and answered here.
        too_far: of the meetings, those repeated in full precision because the models were
            outside the quantiser's radius.
        void: begun and given up, because the partner began one with this node at that moment.
        unanswered: begun with a partner that stayed silent.
        distance: largest coordinate difference at the last meeting.
    """

    meetings: int = 0
    visits: int = 0
    too_far: int = 0
    void: int = 0
    unanswered: int = 0
    distance: float = float("nan")


class Meetings:
    """One node's side of all its meetings, for the main thread (`visit`) and the courier's (`receive`).

    Args:
        condition: its lock guards everything here; notified after every message.
        patient: answer only at rest, between two blocks of local steps; else always.
        on_meeting: told of every finished meeting.
    """

    def __init__(
        self,
        node: Node,
        post: Post,
        peers: Peers,
        condition: threading.Condition,
        stats: SwarmStats,
        *,
        patient: bool,
        on_meeting: Callable[[Meeting], None] | None,
    ) -> None:
        self._node, self._post, self._peers, self._buffers = node, post, peers, node.buffers
        self._condition, self._stats, self._on_meeting = condition, stats, on_meeting
        self._patient = patient
        self._at_rest = not patient
        self._offers: dict[int, Offer] = {}
        self._open: Offer | None = None
        self._put_off: list[tuple[int, Header, Tensor]] = []

    def visit(self, partner: int) -> None:
        """Meet ``partner``: returns when it has answered, or counts as lost, or met this node instead.

        A late answer is still taken in, so even a given-up meeting leaves the mean as it was.
        """
        with self._condition:
            offer, message = self._node.offer(partner)
            self._offers[offer.number] = self._open = offer
            self._post.send(partner, message)
            self._peers.wait(lambda: self._open is not offer, lambda: (partner,))
            if self._open is offer:
                self._open = None
                self._stats.unanswered += 1

    def rest(self) -> None:
        """The node's model is complete: answer what was put off, and everything from now on."""
        with self._condition:
            self._at_rest = True
            for put_off in self._put_off:
                self._answer(*put_off)
            self._put_off.clear()

    def resume(self) -> None:
        """Local steps begin: a patient node puts off what comes."""
        self._at_rest = not self._patient

    def receive(self, source: int, header: Header, message: Tensor) -> None:
        """Handle a message of a meeting; the lock is held."""
        if header.kind == Kind.MEET:
            self._be_met(source, header, message)
            return
        offer = self._offers.get(header.number)
        if offer is not None:
            if header.kind == Kind.TOO_FAR and offer is self._open:
                self._stats.too_far += 1
                self._post.send(source, self._node.insist(offer))
            else:
                self._close(offer, header, message)
        self._buffers.give(message)

    def _be_met(self, source: int, header: Header, message: Tensor) -> None:
        crossed = self._open is not None and self._open.partner == source
        if crossed and self._peers.rank < source:  # both began one: mine counts, and is answered there
            self._peers.tell(source, Kind.VOID, header.number)
            self._buffers.give(message)
        elif self._at_rest:
            self._answer(source, header, message)
        else:
            self._put_off.append((source, header, message))

    def _answer(self, source: int, header: Header, message: Tensor) -> None:
        began = time.time()
        reply = self._node.answer(header, message)
        self._post.send(source, reply)
        self._buffers.give(message)
        if kind_of(reply) == Kind.ANSWER:
            self._stats.visits += 1
            self._note(source, False, began, header.bits)

    def _close(self, offer: Offer, header: Header, message: Tensor) -> None:
        del self._offers[offer.number]
        if header.kind == Kind.ANSWER:
            self._node.conclude(offer, header, message)
            self._stats.meetings += 1
            self._note(offer.partner, True, offer.began, header.bits)
        else:
            self._node.drop(offer)
            self._stats.void += 1
        if self._open is offer:
            self._open = None

    def _note(self, partner: int, begun_here: bool, began: float, bits: int) -> None:
        self._stats.distance = self._node.distance or 0.0
        if self._on_meeting is not None:
            self._on_meeting(Meeting(partner, begun_here, began, time.time(), self._stats.steps, bits))
