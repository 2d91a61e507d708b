"""A cluster on one machine: hosts as network namespaces with rate-limited links, and what runs on them."""

from benchmarks.cluster.cluster import Cluster, take_down
from benchmarks.cluster.network import ClusterError
from benchmarks.cluster.requirements import missing

__all__ = ["Cluster", "ClusterError", "missing", "take_down"]
