"""For DistributedDataParallel: `register`, or the plain hook with its `State`."""

from hvd_sketch.frontends.ddp import hook, register
from hvd_sketch.frontends.ddp_state import State

__all__ = ["State", "hook", "register"]
