"""What is unsent as an entry of a checkpoint, of torch.distributed or of a framework."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from hvd_sketch.comm.states import broadcast_pickled
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import Exchange
from hvd_sketch.settings import given_numbers


class Keeping(Protocol):
    """What has a memory: a distributed optimizer, or `hvd_sketch.ddp.State`."""

    @property
    def exchange(self) -> Exchange: ...

    def memory_state_dict(self) -> dict[str, Any]: ...

    def load_memory_state_dict(self, state: dict[str, Any]) -> None: ...


class SavedMemory:
    """The memory of every rank, for ``torch.distributed.checkpoint``, or for a framework's checkpoints::

        dcp.save({"model": …, "optimizer": …, "memory": SavedMemory(optimizer)}, checkpoint_id=folder)
        accelerator.register_for_checkpointing(SavedMemory(state, gathered=True))

    Every rank saves and loads its own, on as many ranks. For another number ``flush()`` one step before saving, and
    load the checkpoint without this entry.

    Args:
        keeper: whose memory.
        gathered: rank 0 is given the memories of all ranks, for a checkpoint that rank 0 alone writes. Then
            ``state_dict()`` has to be called on all ranks; it broadcasts each rank's memory in turn, and rank 0 needs
            room for all of them.
    """

    @given_numbers
    def __init__(self, keeper: Keeping, *, gathered: bool = False) -> None:
        self._keeper, self._gathered = keeper, gathered

    def state_dict(self) -> dict[str, bytes]:
        """This rank's memory under a name of its own, in one piece: a checkpoint's tensors must be there before."""
        file, comm = io.BytesIO(), self._keeper.exchange.comm
        torch.save(self._keeper.memory_state_dict(), file)
        kept = {self._name(comm.rank): file.getvalue()}
        for rank in range(comm.size) if self._gathered else ():
            theirs = broadcast_pickled(comm, file.getvalue(), rank, "hvd_sketch.saved_memory")
            if comm.rank == 0:
                kept[self._name(rank)] = theirs
        return kept

    def load_state_dict(self, state_dict: Mapping[str, bytes]) -> None:
        """Restore it.

        Raises:
            ConfigurationError: when this rank's is not there; or see `Exchange.load_state_dict`.
        """
        name = self._name(self._keeper.exchange.comm.rank)
        if name not in state_dict:
            raise ConfigurationError(
                f"the checkpoint has no memory of {name}, but of {', '.join(state_dict) or 'none'}: where rank 0 "
                "alone writes it, save SavedMemory(…, gathered=True); for another number of ranks, flush() one step "
                "before saving, and load the checkpoint without this entry"
            )
        self._keeper.load_memory_state_dict(torch.load(io.BytesIO(state_dict[name]), weights_only=True))

    def _name(self, rank: int) -> str:
        """Entries of one name are one to torch.distributed, and are saved by one rank."""
        return f"rank {rank} of {self._keeper.exchange.comm.size}"
