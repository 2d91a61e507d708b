"""The arithmetic of meetings, without MPI: what is conserved, how far nodes move, and what is refused."""

import math
import threading
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_sketch.comm.buffers import Buffers
from hvd_sketch.methods.graphs import NAMES, graph_of, spectral_gap
from hvd_sketch.methods.swarm.lattice import Lattice
from hvd_sketch.methods.swarm.meetings import Meetings, SwarmStats
from hvd_sketch.methods.swarm.message import HEADER, Header, Kind
from hvd_sketch.methods.swarm.node import Node
from hvd_sketch.methods.swarm.peers import Peers


def meet(first: Node, second: Node) -> Kind:
    """A whole meeting that ``first`` begins; returns the kind of the first reply."""
    offer, message = first.offer(1)
    reply = second.answer(Header.read(message), message)
    kind = Header.read(reply).kind
    if kind == Kind.TOO_FAR:
        message = first.insist(offer)
        reply = second.answer(Header.read(message), message)
    if Header.read(reply).kind == Kind.ANSWER:
        first.conclude(offer, Header.read(reply), reply)
    return kind


def nodes(models: list[Tensor], lattice: Lattice | None) -> list[Node]:
    return [Node(model, lattice, Buffers()) for model in models]


@settings(max_examples=50, deadline=None)
@given(
    bits=st.sampled_from([4, 8, 16]),
    seed=st.integers(0, 1000),
    events=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4), st.booleans()), min_size=1, max_size=40),
)
def test_the_sum_is_conserved_to_the_last_bit(bits: int, seed: int, events: list[tuple[int, int, bool]]) -> None:
    """Also when meetings overlap: an answer may come late, after other meetings."""
    generator = torch.Generator().manual_seed(seed)
    models = [torch.randint(-30, 30, (50,), generator=generator) * 2.0**-10 for _ in range(5)]
    swarm, late = nodes(models, Lattice(bits, step=2.0**-9)), []
    before = torch.stack(models).sum(dim=0)
    for i, shift, delayed in events:
        first, second = swarm[i], swarm[(i + shift) % 5]
        offer, message = first.offer(0)
        reply = second.answer(Header.read(message), message)
        if Header.read(reply).kind == Kind.ANSWER:
            late.append((first, offer, reply))
        if not delayed:
            for node, its_offer, its_reply in late:
                node.conclude(its_offer, Header.read(its_reply), its_reply)
            late.clear()
    for node, its_offer, its_reply in late:
        node.conclude(its_offer, Header.read(its_reply), its_reply)
    assert torch.equal(torch.stack(models).sum(dim=0), before)


def test_in_full_precision_both_nodes_adopt_the_average() -> None:
    models = [torch.randn(100, dtype=torch.float64) for _ in range(2)]
    average = (models[0] + models[1]) / 2
    assert meet(*nodes(models, None)) == Kind.ANSWER
    assert torch.allclose(models[0], average, rtol=0, atol=1e-15)
    assert torch.allclose(models[1], average, rtol=0, atol=1e-15)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_quantised_nodes_end_within_half_a_step_of_the_average(bits: int) -> None:
    step = 2.0**-9
    first = torch.randn(1000, dtype=torch.float64)
    models = [first, first + step * (2 ** (bits - 1) - 2) * (2 * torch.rand(1000, dtype=torch.float64) - 1)]
    average = (models[0] + models[1]) / 2
    assert meet(*nodes(models, Lattice(bits, step))) == Kind.ANSWER
    for model in models:
        assert float((model - average).abs().max()) <= step / 2


def test_outside_the_radius_the_meeting_is_repeated_in_full_precision() -> None:
    models = [torch.zeros(100, dtype=torch.float64), torch.full((100,), 0.5, dtype=torch.float64)]
    swarm = nodes(models, Lattice(8, step=2.0**-10))
    offer, message = swarm[0].offer(1)
    reply = swarm[1].answer(Header.read(message), message)
    assert Header.read(reply).kind == Kind.TOO_FAR
    assert reply.numel() == HEADER
    assert float(models[0].abs().max()) == 0  # nothing has changed yet
    assert float(models[1].min()) == 0.5
    swarm[0].drop(offer)
    assert meet(*swarm) == Kind.TOO_FAR
    assert all(bool((model == 0.25).all()) for model in models)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_step_follows_the_models_as_they_approach(bits: int) -> None:
    swarm = nodes([torch.randn(500), torch.randn(500)], Lattice(bits))
    distances = []
    for _ in range(14):
        assert meet(*swarm) == Kind.ANSWER
        swarm.reverse()
        distances.append(float((swarm[0].model - swarm[1].model).abs().max()))
    assert distances[0] < 1e-6  # in full precision, because no distance was known
    swarm[0].model.add_(torch.randn(500))
    for _ in range(14):
        meet(*swarm)
        swarm.reverse()
    assert float((swarm[0].model - swarm[1].model).abs().max()) < 1e-3


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_values_that_are_not_finite_are_never_taken_in(wrong: float) -> None:
    models = [torch.zeros(10), torch.ones(10)]
    models[0][3] = wrong
    assert meet(*nodes(models, None)) == Kind.VOID
    assert bool((models[1] == 1).all())


@pytest.mark.parametrize("name", NAMES)
def test_a_random_meeting_contracts_by_the_spectral_gap(name: str) -> None:
    """The mean over all possible meetings from the slowest direction, which is an eigenvector."""
    graph = graph_of(name, 8)
    slowest = torch.linalg.eigh(graph.pairwise()).eigenvectors[:, -2]
    expected = 0.0
    for i, neighbours in enumerate(graph.neighbours):
        for j in neighbours:
            models = [slowest[rank : rank + 1].clone() for rank in range(8)]
            meet(*nodes([models[i], models[j]], None))
            expected += float(torch.cat(models).square().sum()) / (8 * len(neighbours))
    assert expected == pytest.approx(1 - spectral_gap(graph.pairwise()), abs=1e-12)


class Wire:
    """Messages between two nodes, delivered when the test says so."""

    def __init__(self, sender: int, lines: list[deque[tuple[int, Tensor]]]) -> None:
        self.last_heard = [0.0, 0.0]
        self.failure: BaseException | None = None
        self._sender, self._lines = sender, lines

    def send(self, to: int, message: Tensor) -> None:
        self._lines[to].append((self._sender, message.clone()))


class End:
    """One of two nodes with its meetings, driven by hand."""

    def __init__(self, rank: int, value: float, lines: list[deque[tuple[int, Tensor]]], *, patient: bool) -> None:
        self.model, self.stats, self._line = torch.full((3,), value), SwarmStats(), lines[rank]
        condition, buffers, wire = threading.Condition(), Buffers(), Wire(rank, lines)
        peers = Peers(wire, buffers, condition, rank, 2, patience=5.0, on_lost="raise")
        node = Node(self.model, None, buffers)
        self.meetings = Meetings(node, wire, peers, condition, self.stats, patient=patient, on_meeting=None)
        self._condition = condition

    def deliver(self) -> None:
        while self._line:
            source, message = self._line.popleft()
            with self._condition:
                self.meetings.receive(source, Header.read(message), message)
                self._condition.notify_all()


@pytest.mark.parametrize("first", [0, 1])
def test_when_two_pick_each_other_they_meet_once(first: int) -> None:
    lines: list[deque[tuple[int, Tensor]]] = [deque(), deque()]
    ends = [End(0, 0.0, lines, patient=False), End(1, 1.0, lines, patient=False)]
    visits = [threading.Thread(target=ends[rank].meetings.visit, args=(1 - rank,)) for rank in (0, 1)]
    for visit in visits:
        visit.start()
    while not (lines[0] and lines[1]):  # both have begun before either is answered
        pass
    while any(visit.is_alive() for visit in visits):
        ends[first].deliver()
        ends[1 - first].deliver()
    assert [float(end.model[0]) for end in ends] == [0.5, 0.5]
    assert [(end.stats.meetings, end.stats.visits, end.stats.void) for end in ends] == [(1, 0, 0), (0, 1, 1)]


def test_a_patient_node_answers_at_rest_only() -> None:
    lines: list[deque[tuple[int, Tensor]]] = [deque(), deque()]
    eager, patient = End(0, 0.0, lines, patient=True), End(1, 1.0, lines, patient=True)
    eager.meetings.rest()
    visit = threading.Thread(target=eager.meetings.visit, args=(1,))
    visit.start()
    while not lines[1]:
        pass
    patient.deliver()
    assert not lines[0]  # put off: it computes
    assert float(patient.model[0]) == 1
    patient.meetings.rest()
    eager.deliver()
    visit.join(10)
    assert [float(end.model[0]) for end in (eager, patient)] == [0.5, 0.5]
