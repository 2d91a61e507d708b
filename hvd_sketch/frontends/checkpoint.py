"""What is unsent as an entry of a checkpoint of torch.distributed."""

from __future__ import annotations

import io
from typing import Any, Protocol

import torch

from hvd_sketch.exchange import Exchange


class Keeping(Protocol):
    """What has a memory: a distributed optimizer, or `hvd_sketch.ddp.State`."""

    @property
    def exchange(self) -> Exchange: ...

    def memory_state_dict(self) -> dict[str, Any]: ...

    def load_memory_state_dict(self, state: dict[str, Any]) -> None: ...


class SavedMemory:
    """The memory of every rank, for ``torch.distributed.checkpoint``::

        dcp.save({"model": …, "optimizer": …, "memory": SavedMemory(optimizer)}, checkpoint_id=folder)

    Every rank saves and loads its own, on as many ranks. For another number ``flush()`` one step before saving, and
    load the checkpoint without this entry.

    Args:
        keeper: whose memory.
    """

    def __init__(self, keeper: Keeping) -> None:
        self._keeper = keeper

    @property
    def _name(self) -> str:
        """Of this rank: entries of one name are one, and are saved by one rank."""
        comm = self._keeper.exchange.comm
        return f"rank {comm.rank} of {comm.size}"

    def state_dict(self) -> dict[str, Any]:
        """This rank's memory under a name of its own, in one piece: a checkpoint's tensors must be there before."""
        file = io.BytesIO()
        torch.save(self._keeper.memory_state_dict(), file)
        return {self._name: file.getvalue()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it.

        Raises:
            ConfigurationError: see `Exchange.load_state_dict`.
        """
        self._keeper.load_memory_state_dict(torch.load(io.BytesIO(state_dict[self._name]), weights_only=True))
