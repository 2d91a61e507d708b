"""SwarmSGD: training without an allreduce."""

from hvd_sketch.methods.swarm.meetings import Meeting, SwarmStats
from hvd_sketch.methods.swarm.optimizer import SwarmSGD
from hvd_sketch.methods.swarm.peers import PeerLost
from hvd_sketch.methods.swarm.settings import Geometric

__all__ = ["Geometric", "Meeting", "PeerLost", "SwarmSGD", "SwarmStats"]
