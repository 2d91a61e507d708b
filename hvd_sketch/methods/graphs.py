"""Who may talk to whom, with which weights, and how fast that makes models agree."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.errors import ConfigurationError

NAMES = ("complete", "ring", "torus", "hypercube")


@dataclass(frozen=True)
class Graph:
    """A connected undirected graph over the ranks; ``neighbours[i]`` in rising order, without i."""

    neighbours: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.neighbours)

    def mixing(self, *, lazy: bool = False) -> Tensor:
        """Metropolis weights: symmetric and doubly stochastic on every graph, float64 ``(n, n)``::

            a_ij = 1 / (1 + max(deg_i, deg_j))  for neighbours,   a_ii = 1 - sum_j a_ij

        Args:
            lazy: return ``(I + A) / 2`` instead, which is positive definite.
        """
        matrix = torch.zeros(self.size, self.size, dtype=torch.float64, device="cpu")
        for node, neighbours in enumerate(self.neighbours):
            for other in neighbours:
                matrix[node, other] = 1.0 / (1 + max(len(neighbours), len(self.neighbours[other])))
        matrix += torch.diag(1.0 - matrix.sum(dim=1))
        return (matrix + torch.eye(self.size, dtype=torch.float64, device="cpu")) / 2 if lazy else matrix

    def pairwise(self) -> Tensor:
        """The expected matrix of one meeting, float64 ``(n, n)``: a random node averages with a random neighbour.

        One meeting is a projection, so with models x around their mean::

            E ||x' - mean||^2  <=  (1 - spectral_gap(pairwise)) ||x - mean||^2

        with equality on the complete graph. Source: Boyd, Ghosh, Prabhakar, Shah, "Randomized
        gossip algorithms" (2006).
        """
        matrix = torch.eye(self.size, dtype=torch.float64, device="cpu")
        for node, neighbours in enumerate(self.neighbours):
            for other in neighbours:
                half = 0.5 / (self.size * len(neighbours))
                matrix[node, node] -= half
                matrix[other, other] -= half
                matrix[node, other] += half
                matrix[other, node] += half
        return matrix


def spectral_gap(matrix: Tensor) -> float:
    """One minus the second largest absolute eigenvalue of a symmetric doubly stochastic matrix."""
    if matrix.shape[0] == 1:
        return 1.0
    return 1.0 - float(torch.linalg.eigvalsh(matrix).abs().sort().values[-2])


def graph_of(graph: Any, size: int) -> Graph:
    """The graph of ``size`` ranks that a user named or gave.

    Args:
        graph: one of ``complete``, ``ring``, ``torus`` (as square as possible) and
            ``hypercube``, a networkx graph whose nodes are 0 … size - 1, or a `Graph`.

    Raises:
        ConfigurationError: for an unknown name, a size that the shape cannot have, other nodes,
            a directed or unconnected graph, a node joined to itself, or networkx not installed.
    """
    if isinstance(graph, Graph):
        built = graph
    else:
        networkx = _networkx()
        built = _converted(networkx, _named(networkx, graph, size) if isinstance(graph, str) else graph)
    if built.size != size:
        raise ConfigurationError(f"graph has {built.size} nodes but there are {size} ranks; give it one node a rank")
    return built


def _networkx() -> Any:
    try:
        return importlib.import_module("networkx")
    except ImportError:
        raise ConfigurationError("graphs are made by networkx, which is missing: pip install networkx") from None


def _named(networkx: Any, name: str, size: int) -> Any:
    if name == "complete":
        return networkx.complete_graph(size)
    if name == "ring":
        return networkx.path_graph(size) if size < 3 else networkx.cycle_graph(size)
    if name == "torus":
        rows = next(rows for rows in range(math.isqrt(size), 0, -1) if size % rows == 0)
        if rows == 1 and size > 3:
            raise ConfigurationError(f"graph 'torus' needs rows and columns, but {size} ranks are a prime number")
        return networkx.convert_node_labels_to_integers(networkx.grid_2d_graph(rows, size // rows, periodic=True))
    if name == "hypercube":
        if size & (size - 1):
            raise ConfigurationError(f"graph 'hypercube' needs a power of two of ranks, not {size}")
        cube = networkx.hypercube_graph(size.bit_length() - 1) if size > 1 else networkx.complete_graph(1)
        return networkx.convert_node_labels_to_integers(cube)
    raise ConfigurationError(f"graph {name!r} is unknown; there are {', '.join(NAMES)}, or give a networkx graph")


def _converted(networkx: Any, graph: Any) -> Graph:
    if not isinstance(graph, networkx.Graph) or graph.is_directed():
        raise ConfigurationError(f"graph must be a name, an undirected networkx graph or a Graph, got {graph!r}")
    size = graph.number_of_nodes()
    if size == 0 or set(graph.nodes) != set(range(size)):
        raise ConfigurationError(
            f"graph must have the ranks 0 … {size - 1} as its nodes, it has {list(graph.nodes)[:8]}"
        )
    if not networkx.is_connected(graph):
        raise ConfigurationError("graph is not connected: its parts would train different models")
    if any(graph.has_edge(node, node) for node in graph):
        raise ConfigurationError("graph joins a node to itself; a node's own weight follows from its neighbours'")
    return Graph(tuple(tuple(sorted(graph.neighbors(node))) for node in range(size)))
