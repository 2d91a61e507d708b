"""Graphs: shapes, weights, and the rate at which pairs that meet at random agree."""

import networkx
import pytest
import torch

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.methods.graphs import NAMES, Graph, graph_of, spectral_gap


@pytest.mark.parametrize(("name", "degree"), [("complete", 7), ("ring", 2), ("torus", 3), ("hypercube", 3)])
def test_the_named_graphs_have_their_degree(name: str, degree: int) -> None:
    graph = graph_of(name, 8)
    assert [len(neighbours) for neighbours in graph.neighbours] == [degree] * 8
    for node, neighbours in enumerate(graph.neighbours):
        assert all(node in graph.neighbours[other] for other in neighbours)


@pytest.mark.parametrize("graph", [*NAMES, networkx.star_graph(7), networkx.path_graph(8)], ids=str)
def test_weights_are_symmetric_and_doubly_stochastic(graph: object) -> None:
    structure = graph_of(graph, 8)
    for matrix in (structure.mixing(), structure.mixing(lazy=True), structure.pairwise()):
        assert torch.equal(matrix, matrix.T)
        assert torch.allclose(matrix.sum(dim=0), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-15)
        assert float(matrix.min()) >= 0
        assert 0 < spectral_gap(matrix) <= 1 + 1e-12
    assert float(torch.linalg.eigvalsh(structure.mixing(lazy=True)).min()) >= -1e-12


def test_known_spectral_gaps() -> None:
    assert spectral_gap(graph_of("complete", 8).pairwise()) == pytest.approx(1 / 7)
    ring = (1 + 2 * torch.cos(torch.tensor(2 * torch.pi / 8, dtype=torch.float64))) / 3
    assert spectral_gap(graph_of("ring", 8).mixing()) == pytest.approx(1 - float(ring))
    assert spectral_gap(graph_of("hypercube", 8).mixing()) == pytest.approx(0.5)


@pytest.mark.parametrize("name", NAMES)
def test_the_pairwise_matrix_is_the_mean_over_all_meetings(name: str) -> None:
    graph = graph_of(name, 8)
    expected = torch.zeros(8, 8, dtype=torch.float64)
    for node, neighbours in enumerate(graph.neighbours):
        for other in neighbours:
            meeting = torch.eye(8, dtype=torch.float64)
            meeting[[node, node, other, other], [node, other, node, other]] = 0.5
            expected += meeting / (8 * len(neighbours))
    assert torch.allclose(graph.pairwise(), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_small_worlds(name: str) -> None:
    assert graph_of(name, 1).neighbours == ((),)
    assert spectral_gap(graph_of(name, 1).mixing()) == 1
    assert graph_of(name, 2).neighbours == ((1,), (0,))


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ("star", "complete, ring, torus, hypercube"),
        ("torus", "prime"),
        ("hypercube", "power of two"),
        (networkx.path_graph(6), "6 nodes but there are 7 ranks"),
        (networkx.disjoint_union(networkx.path_graph(3), networkx.path_graph(4)), "not connected"),
        (networkx.relabel_nodes(networkx.path_graph(7), {0: "a"}), "the ranks 0"),
        (networkx.DiGraph([(0, 1)]), "undirected"),
        (networkx.Graph([(i, (i + 1) % 7) for i in range(7)] + [(3, 3)]), "to itself"),
        (5, "undirected networkx graph"),
        (Graph(((1,), (0,))), "2 nodes"),
    ],
)
def test_bad_graphs_are_refused(graph: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        graph_of(graph, 7)
