"""Training with a server: asynchronous, in tiers, and with workers that cannot be trusted."""

from hvd_sketch.methods.server.adsaga import ADSAGA
from hvd_sketch.methods.server.errors import ServerLost, TurnedAway, WorkersLost
from hvd_sketch.methods.server.fedat import FedAT
from hvd_sketch.methods.server.log import read_log
from hvd_sketch.methods.server.optimizer import AsyncSGD
from hvd_sketch.methods.server.place import Place, place
from hvd_sketch.methods.server.polyline import Polyline
from hvd_sketch.methods.server.privacy import LocalNoise
from hvd_sketch.methods.server.replay import replay
from hvd_sketch.methods.server.rules import (
    FedAsync,
    Gathered,
    Hinge,
    Krum,
    Mean,
    Median,
    MultiKrum,
    Plain,
    Polynomial,
    Push,
    Rule,
    Saga,
    Tiers,
    TrimmedMean,
    Zeno,
    ZenoPlus,
    ZenoPS,
    ZenoPSAsync,
)
from hvd_sketch.methods.server.stats import ServerStats, WorkerCounts

__all__ = [
    "ADSAGA",
    "AsyncSGD",
    "FedAT",
    "FedAsync",
    "Gathered",
    "Hinge",
    "Krum",
    "LocalNoise",
    "Mean",
    "Median",
    "MultiKrum",
    "Place",
    "Plain",
    "Polyline",
    "Polynomial",
    "Push",
    "Rule",
    "Saga",
    "ServerLost",
    "ServerStats",
    "Tiers",
    "TrimmedMean",
    "TurnedAway",
    "WorkerCounts",
    "WorkersLost",
    "Zeno",
    "ZenoPS",
    "ZenoPSAsync",
    "ZenoPlus",
    "place",
    "read_log",
    "replay",
]
