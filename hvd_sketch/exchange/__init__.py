"""Exchanges: how one step's gradients become one update on all ranks."""

from hvd_sketch.exchange.base import Exchange
from hvd_sketch.exchange.dense import DenseExchange
from hvd_sketch.exchange.powersgd import PowerSGDExchange
from hvd_sketch.exchange.sharded import ShardedExchange
from hvd_sketch.exchange.sketched import SketchExchange
from hvd_sketch.exchange.stride import StrideExchange
from hvd_sketch.exchange.topk import TopKExchange

__all__ = [
    "DenseExchange",
    "Exchange",
    "PowerSGDExchange",
    "ShardedExchange",
    "SketchExchange",
    "StrideExchange",
    "TopKExchange",
]
