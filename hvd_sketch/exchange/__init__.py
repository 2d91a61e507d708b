"""What every exchange shares: how one step's gradients become one update on all ranks."""

from hvd_sketch.exchange.base import Exchange
from hvd_sketch.exchange.budget import unreachable
from hvd_sketch.exchange.dense import DenseExchange
from hvd_sketch.exchange.hierarchical import HierarchicalExchange
from hvd_sketch.exchange.setting import Setting
from hvd_sketch.exchange.update import Part

__all__ = ["DenseExchange", "Exchange", "HierarchicalExchange", "Part", "Setting", "unreachable"]
