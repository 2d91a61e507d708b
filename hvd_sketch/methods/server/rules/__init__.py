"""Rules of a server, one algorithm a file."""

from hvd_sketch.methods.server.rules.base import Gathered, Push, Rule
from hvd_sketch.methods.server.rules.fedasync import FedAsync, Hinge, Polynomial
from hvd_sketch.methods.server.rules.krum import Krum, MultiKrum
from hvd_sketch.methods.server.rules.plain import Plain
from hvd_sketch.methods.server.rules.robust import Mean, Median, TrimmedMean
from hvd_sketch.methods.server.rules.saga import Saga
from hvd_sketch.methods.server.rules.tiers import Tiers
from hvd_sketch.methods.server.rules.zeno import Zeno
from hvd_sketch.methods.server.rules.zeno_plus import ZenoPlus
from hvd_sketch.methods.server.rules.zeno_ps import ZenoPS, ZenoPSAsync

__all__ = [
    "FedAsync",
    "Gathered",
    "Hinge",
    "Krum",
    "Mean",
    "Median",
    "MultiKrum",
    "Plain",
    "Polynomial",
    "Push",
    "Rule",
    "Saga",
    "Tiers",
    "TrimmedMean",
    "Zeno",
    "ZenoPS",
    "ZenoPSAsync",
    "ZenoPlus",
]
