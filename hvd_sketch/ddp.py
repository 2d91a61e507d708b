"""For DistributedDataParallel: `register`, or the plain hook with its `State`."""

from hvd_sketch.frontends.ddp import State, hook, register

__all__ = ["State", "hook", "register"]
