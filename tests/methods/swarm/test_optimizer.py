"""SwarmSGD on real ranks: conservation, contraction, no deadlock, nobody waits for the slowest, NaN."""

import math
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hvd_sketch.errors import ConfigurationError, RankMismatchError
from hvd_sketch.methods.graphs import graph_of, spectral_gap
from hvd_sketch.methods.swarm import Geometric, Meeting, PeerLost, SwarmSGD, SwarmStats
from hvd_sketch.methods.swarm.lattice import Lattice
from tests.support.ranks import in_turn, ranks

COUNT = 1000
RATE = 2.0**-11
VARIANTS: dict[str, dict[str, Any]] = {
    "non-blocking": {},
    "blocking": {"blocking": True},
    "4 bits": {"quantization": Lattice(4, step=2.0**-5)},
    "8 bits": {"quantization": Lattice(8, step=2.0**-8)},
    "16 bits": {"quantization": Lattice(16, step=2.0**-9)},
    "8 bits, blocking, ring": {"quantization": Lattice(8, step=2.0**-8), "blocking": True, "graph": "ring"},
    "2 steps, hypercube": {"local_steps": 2, "graph": "hypercube", "quantization": Lattice(8, step=2.0**-8)},
    "geometric, torus": {"local_steps": Geometric(3.0), "graph": "torus", "quantization": Lattice(8, step=2.0**-8)},
}


class Vector(torch.nn.Module):
    """A model that is one vector."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(values.clone())


def swarm_of(model: torch.nn.Module, comm: Any, rate: float = RATE, **arguments: Any) -> SwarmSGD:
    sgd = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.0)
    return SwarmSGD(sgd, model=model, comm=comm, **{"same_start": False, "patience": 30.0, **arguments})


def train(optimizer: SwarmSGD, model: torch.nn.Module, steps: int, gradient: float = 1.0) -> None:
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()


class Conserved(NamedTuple):
    """The mean model before, after, and what it should be after."""

    before: Tensor
    after: Tensor
    expected: Tensor
    distance_before: float
    distance_after: float
    bytes_sent: int
    stats: SwarmStats


def conserve(comm: Any, arguments: dict[str, Any], steps: int) -> Conserved:
    generator = torch.Generator().manual_seed(comm.rank)
    # multiples of half a lattice step, so that every sum is an exact float32
    model = Vector(torch.randint(-100, 100, (COUNT,), generator=generator) * 2.0**-10)
    with swarm_of(model, comm, **arguments) as optimizer:
        with optimizer.average_model():
            before = model.x.detach().clone()
        distance = optimizer.consensus_distance()
        sent = optimizer.stats.bytes_sent
        comm.barrier()
        train(optimizer, model, steps + comm.rank, gradient=float(comm.rank))
        optimizer._wait_for_all()
        sent = optimizer.stats.bytes_sent - sent
        with optimizer.average_model():
            after = model.x.detach().clone()
        moved = sum(RATE * rank * (steps + rank) for rank in range(comm.size)) / comm.size
        final = optimizer.consensus_distance()
    return Conserved(before, after, before - moved, distance, final, sent, optimizer.stats)


def contract(comm: Any, trials: int) -> list[float]:
    """Nodes begin meetings in a random order, one at a time; the squared distance's ratio in every trial."""
    model, order, ratios = Vector(torch.zeros(COUNT, dtype=torch.float64)), random.Random(7), []
    with swarm_of(model, comm, rate=0.0) as optimizer:
        for trial in range(trials):
            model.x.data.normal_(generator=torch.Generator().manual_seed(trial * comm.size + comm.rank))
            optimizer.load_state_dict(optimizer.state_dict())  # begin anew from here
            before = optimizer.consensus_distance()
            for _ in range(comm.size):
                if order.randrange(comm.size) == comm.rank:
                    train(optimizer, model, 1)
                comm.barrier()
            ratios.append((optimizer.consensus_distance() / before) ** 2)
    return ratios


class Fixed(random.Random):
    """Always picks the same partner."""

    def __init__(self, partner: int) -> None:
        super().__init__()
        self._partner = partner

    def choice(self, seq: Any) -> Any:
        return self._partner


def pick(comm: Any, partner: int, blocking: int) -> tuple[int, int]:
    model = Vector(torch.full((COUNT,), float(comm.rank)))
    with swarm_of(model, comm, blocking=bool(blocking)) as optimizer:
        optimizer._random = Fixed(partner)
        train(optimizer, model, 20)
    return optimizer.stats.meetings + optimizer.stats.void, optimizer.stats.unanswered


def poison(comm: Any, blocking: bool) -> tuple[bool, int]:
    model = Vector(torch.zeros(COUNT))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with SwarmSGD(sgd, model=model, comm=comm, blocking=blocking, local_steps=2) as optimizer:
        for step in range(20):
            model.x.grad = torch.full((COUNT,), math.nan if comm.rank == 2 and step == 6 else 1.0)
            optimizer.step()
            if step == 6:  # before the meeting at which the node itself notices
                with optimizer.average_model():
                    finite = bool(model.x.isfinite().all())
                finite &= math.isfinite(optimizer.consensus_distance())
        with optimizer.average_model():
            finite &= bool(model.x.isfinite().all())
    return finite and bool(model.x.isfinite().all()), optimizer.stats.skipped


def buffers(comm: Any) -> tuple[float, float, float]:
    norm = torch.nn.BatchNorm1d(2)
    with swarm_of(norm, comm) as optimizer:
        mean = norm.state_dict()["running_mean"]
        mean.fill_(comm.rank)
        train(optimizer, norm, 6)
        own = float(mean[0])
        with optimizer.average_model():
            averaged = float(mean[0])
        return own, averaged, float(mean[0])


def half_precision(comm: Any) -> tuple[Tensor, Tensor]:
    values = torch.randint(-100, 100, (COUNT,), generator=torch.Generator().manual_seed(comm.rank)) * 2.0**-5
    model = Vector(values.to(torch.bfloat16))
    with swarm_of(model, comm, rate=0.0) as optimizer:
        before = optimizer._mean(optimizer._contribution())[0]
        train(optimizer, model, 10)
        return before, optimizer._mean(optimizer._contribution())[0]


def uneven(comm: Any) -> str:
    try:
        with swarm_of(Vector(torch.zeros(2)), comm) as optimizer:
            if comm.rank == 0:
                optimizer.consensus_distance()
    except RuntimeError as error:
        return str(error)
    return "not told"


class OnMpi(NamedTuple):
    conserved: dict[str, Conserved]
    ratios: list[float]
    picked: dict[str, tuple[int, int]]
    poisoned: list[tuple[bool, int]]
    buffers: tuple[float, float, float]
    half: tuple[Tensor, Tensor]
    refusals: list[str]
    uneven: str


def refuse(comm: Any) -> list[str]:
    told = []
    for arguments in ({"local_steps": 1 + comm.rank}, {"graph": "ring" if comm.rank else "complete"}):
        try:
            swarm_of(Vector(torch.zeros(2)), comm, **arguments)
        except RankMismatchError as error:
            told.append(str(error))
    return told


def run_on_mpi() -> OnMpi:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    picks = {"mutual": comm.rank ^ 1, "circle": (comm.rank + 1) % comm.size, "star": int(comm.rank == 0)}
    return OnMpi(
        {name: conserve(comm, arguments, 40) for name, arguments in VARIANTS.items()},
        contract(comm, 40),
        {
            f"{name} {blocking}": pick(comm, partner, blocking)
            for name, partner in picks.items()
            for blocking in (0, 1)
        },
        [poison(comm, blocking) for blocking in (False, True)],
        buffers(comm),
        half_precision(comm),
        refuse(comm),
        uneven(comm),
    )


@pytest.fixture(scope="module")
def on_8_ranks() -> list[OnMpi]:
    return ranks(8, run_on_mpi, timeout=280)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_mean_moves_by_the_gradients_alone_and_to_the_last_bit(on_8_ranks: list[OnMpi], name: str) -> None:
    exact = name not in ("non-blocking", "blocking")  # full precision halves anew in every meeting, and rounds
    for result in on_8_ranks:
        run = result.conserved[name]
        assert torch.equal(run.after, on_8_ranks[0].conserved[name].after)
        assert torch.allclose(run.after, run.expected, rtol=0, atol=0 if exact else 1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_models_come_together(on_8_ranks: list[OnMpi], name: str) -> None:
    run = on_8_ranks[0].conserved[name]
    assert run.distance_after < run.distance_before / 2


@pytest.mark.parametrize(
    ("name", "payload"),
    [("non-blocking", 4 * COUNT), ("4 bits", COUNT // 2), ("8 bits", COUNT), ("16 bits", 2 * COUNT)],
)
def test_what_is_sent_is_the_code_and_16_bytes_a_message(on_8_ranks: list[OnMpi], name: str, payload: int) -> None:
    for run in (result.conserved[name] for result in on_8_ranks):
        stats = run.stats
        assert (stats.too_far, stats.unanswered) == (0, 0)
        assert stats.meetings + stats.void == stats.steps
        models = (stats.steps + stats.visits) * (16 + payload)
        assert models <= run.bytes_sent < models + 16 * stats.steps + 500  # refusals, and one wait for all


def test_meetings_follow_the_local_steps(on_8_ranks: list[OnMpi]) -> None:
    for rank, result in enumerate(on_8_ranks):
        twos = result.conserved["2 steps, hypercube"].stats
        assert twos.meetings + twos.void == (40 + rank) // 2
    geometric = sum(result.conserved["geometric, torus"].stats.meetings for result in on_8_ranks)
    assert 60 < geometric < 180  # of 348 steps, 3 a meeting on average


def test_consensus_contracts_at_the_rate_that_the_spectral_gap_predicts(on_8_ranks: list[OnMpi]) -> None:
    """8 meetings of random nodes, one after the other, on the complete graph, where the bound is an equality."""
    predicted = (1 - spectral_gap(graph_of("complete", 8).pairwise())) ** 8
    ratios = on_8_ranks[0].ratios
    assert sum(ratios) / len(ratios) == pytest.approx(predicted, rel=0.15)


def on_4_ranks() -> tuple[dict[str, Conserved], list[float]]:
    from mpi4py import MPI

    names = ("blocking", "8 bits", "geometric, torus")
    return {name: conserve(MPI.COMM_WORLD, VARIANTS[name], 40) for name in names}, contract(MPI.COMM_WORLD, 200)


class Of4Ranks(NamedTuple):
    """What each rank tells of its runs."""

    conserved: Sequence[tuple[dict[str, Conserved], list[float]]]
    straggled: Sequence[tuple[list[Meeting], SwarmStats]]
    blocked: Sequence[tuple[list[Meeting], SwarmStats]]


@pytest.fixture(scope="module")
def of_4_ranks() -> Of4Ranks:
    bodies = [on_4_ranks, partial(straggle, False), partial(straggle, True)]
    return Of4Ranks(*zip(*ranks(4, in_turn, bodies, timeout=280), strict=True))


def test_4_ranks_conserve_the_mean_and_contract_as_predicted(of_4_ranks: Of4Ranks) -> None:
    results = of_4_ranks.conserved
    for runs, _ in results:
        for name, run in runs.items():
            assert torch.equal(run.after, results[0][0][name].after)
            assert torch.allclose(run.after, run.expected, rtol=0, atol=1e-6 if name == "blocking" else 0)
            assert run.distance_after < run.distance_before / 2
    ratios = results[0][1]
    predicted = (1 - spectral_gap(graph_of("complete", 4).pairwise())) ** 4
    assert sum(ratios) / len(ratios) == pytest.approx(predicted, rel=0.15)


@pytest.mark.parametrize("blocking", [0, 1])
@pytest.mark.parametrize("name", ["mutual", "circle", "star"])
def test_nodes_that_pick_each_other_or_in_a_circle_do_not_deadlock(
    on_8_ranks: list[OnMpi], name: str, blocking: int
) -> None:
    assert [result.picked[f"{name} {blocking}"] for result in on_8_ranks] == [(20, 0)] * 8


def test_a_nan_on_one_node_does_not_spread(on_8_ranks: list[OnMpi]) -> None:
    for rank, result in enumerate(on_8_ranks):
        assert result.poisoned == [(True, int(rank == 2))] * 2


def test_batch_norm_statistics_stay_with_their_node_except_in_the_average(on_8_ranks: list[OnMpi]) -> None:
    assert [result.buffers for result in on_8_ranks] == [(rank, 3.5, rank) for rank in range(8)]


def test_what_half_precision_cannot_hold_is_not_lost(on_8_ranks: list[OnMpi]) -> None:
    before, after = on_8_ranks[0].half
    assert torch.allclose(before, after, rtol=0, atol=1e-6)


def test_settings_that_differ_are_refused_alike_on_all_ranks(on_8_ranks: list[OnMpi]) -> None:
    for result in on_8_ranks:
        assert result.refusals == on_8_ranks[0].refusals
        assert len(result.refusals) == 2
        assert "local_steps: rank 0 has '1', rank 1 has '2'" in result.refusals[0]


def test_averages_that_are_not_called_equally_often_are_told_on_all_ranks(on_8_ranks: list[OnMpi]) -> None:
    for result in on_8_ranks:
        assert result.uneven == on_8_ranks[0].uneven
        assert result.uneven.startswith("88% of the nodes called finish(), the others average_model()")


def straggle(blocking: bool) -> tuple[list[Meeting], SwarmStats]:
    """Rank 0's second step ends only after it has been visited 8 times meanwhile; all others just train on."""
    from mpi4py import MPI

    comm, timeline = MPI.COMM_WORLD, list[Meeting]()
    model = Vector(torch.zeros(COUNT))
    arguments: dict[str, Any] = {"blocking": blocking, "local_steps": 3, "patience": 5.0}
    with swarm_of(model, comm, on_meeting=timeline.append, **arguments) as optimizer:
        if comm.rank == 0:
            train(optimizer, model, 1)
            deadline = time.monotonic() + 60
            while not blocking and optimizer.stats.visits < 8:
                assert time.monotonic() < deadline, "the slow node was not visited while it computed"
            time.sleep(1 if blocking else 0)
            train(optimizer, model, 20)  # the others have ended long since
        else:
            train(optimizer, model, 90)
    return timeline, optimizer.stats


def test_a_slow_node_does_not_hold_up_the_others(of_4_ranks: Of4Ranks) -> None:
    """Proved by order, not by time: all the visits fall into one of its local steps, so nobody waited for its end."""
    results = of_4_ranks.straggled
    slow, stats = results[0]
    within = [meeting for meeting in slow if not meeting.begun_here and meeting.step == 1]
    assert len(within) >= 8
    assert stats.meetings == 7  # also after the others had finished
    assert all(stats.meetings + stats.void == 30 and stats.unanswered == 0 for _, stats in results[1:])


def test_in_the_blocking_variant_nodes_are_met_between_their_blocks_only(of_4_ranks: Of4Ranks) -> None:
    for timeline, stats in of_4_ranks.blocked:
        assert {meeting.step % 3 for meeting in timeline if meeting.step < stats.steps} == {0}
        assert stats.unanswered == 0


def test_geometric_steps_have_their_mean() -> None:
    generator = random.Random(1)
    draws = [Geometric(4.0).draw(generator) for _ in range(20_000)]
    assert min(draws) == 1
    assert sum(draws) / len(draws) == pytest.approx(4.0, rel=0.03)
    assert draws.count(1) / len(draws) == pytest.approx(1 / 4, rel=0.05)
    assert Geometric(1.0).draw(generator) == 1


def alone(**arguments: Any) -> SwarmSGD:
    from mpi4py import MPI

    return swarm_of(Vector(torch.zeros(3)), MPI.COMM_SELF, **arguments)


def test_a_single_node_trains_alone() -> None:
    with alone() as optimizer:
        train(optimizer, optimizer.model, 4)
        with optimizer.average_model() as model:
            assert torch.equal(model.get_parameter("x"), torch.full((3,), -4 * RATE))
    with pytest.raises(RuntimeError, match="finished"):
        optimizer.step()
    optimizer.finish()


def test_an_overflow_under_a_scaler_costs_its_step_and_no_other() -> None:
    """Not those before and after it until the next meeting, nor the momentum, nor a lower scale for each."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with alone(local_steps=4) as optimizer:
        parameter = optimizer.model.get_parameter("x")
        for number in range(8):
            optimizer.zero_grad()
            scaler.scale(parameter.sum() * (math.inf if number == 5 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert torch.equal(parameter.detach(), torch.full((3,), -7 * RATE))
    assert (scaler.get_scale(), optimizer.stats.skipped) == (2.0**9, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"local_steps": 0}, "local_steps"),
        ({"local_steps": 2.5}, "local_steps must be a whole number"),
        ({"local_steps": math.nan}, "local_steps must be a whole number"),
        ({"quantization": 8}, "Lattice"),
        ({"patience": 0.0}, "patience"),
        ({"on_lost": "ignore"}, "on_lost"),
        ({"graph": "star"}, "complete, ring"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        alone(**arguments)


def test_bad_communicators_and_steps_are_refused() -> None:
    model = Vector(torch.zeros(3))
    with pytest.raises(ConfigurationError, match="mpi4py intracommunicator"):
        SwarmSGD(torch.optim.SGD(model.parameters(), lr=0.1), model=model, comm="world")
    with pytest.raises(ConfigurationError, match="Geometric mean"):
        Geometric(0.5)
    assert issubclass(PeerLost, RuntimeError)


def test_mpi_without_threads_is_refused() -> None:
    program = f"import mpi4py; mpi4py.rc.thread_level = 'serialized'\nfrom {__name__} import alone\nalone()"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=100)
    assert "MPI_THREAD_MULTIPLE" in told.stderr.splitlines()[-1]


def test_importing_needs_neither_mpi4py_nor_networkx() -> None:
    program = (
        "import sys, hvd_sketch.methods.swarm, hvd_sketch.methods.gossip.lead, hvd_sketch.methods.gossip.decentlam\n"
        "sys.exit(bool({'mpi4py', 'networkx'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=100).returncode == 0
