"""What methods share whose ranks step on their own and meet now and then."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvd_sketch.comm import as_communicator, default_communicator
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.methods.decentralized import Decentralized
from hvd_sketch.methods.flat import Flat, LayoutRule, whole
from hvd_sketch.saved import Equal, Form, unfit
from hvd_sketch.settings import check_numbers


@dataclass(frozen=True, kw_only=True)
class Rhythm:
    """When ranks that step on their own meet, and what they do until then.

    Attributes:
        period: steps between two meetings, at least 1.
        clip_norm: each gradient is scaled down to this L2 norm before the step; None to leave it.
        same_start: begin with rank 0's parameters and saved buffers on every rank.
        layout: how the parameters become one vector.
    """

    period: int
    clip_norm: float | None = None
    same_start: bool = True
    layout: LayoutRule = whole

    def check(self, method: str) -> None:
        """Refuse what is out of range.

        Raises:
            ConfigurationError: naming the method.
        """
        check_numbers(self)
        if self.period < 1:
            raise ConfigurationError(f"{method}: period must be at least 1 step, got {self.period}")
        if self.clip_norm is not None and not self.clip_norm > 0.0:
            raise ConfigurationError(f"{method}: clip_norm must be above 0 or None, got {self.clip_norm}")


class LocalSteps(Decentralized):
    """Steps the wrapped optimizer, and calls `_meet` after every ``period`` steps.

    All vectors are kept where the parameters are.

    A step whose gradient is not finite is left out on that rank, and counted in
    ``stats.skipped``; so nothing such is ever sent.

    Args:
        optimizer: any; its state stays on its rank.
        model: what it trains.
        comm: an mpi4py communicator or one of ours; Horovod where it is installed if None.
        rhythm: when ranks meet.
        settings: what else must be equal on all ranks.

    Raises:
        ConfigurationError, RankMismatchError: see `Decentralized`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        comm: Any,
        rhythm: Rhythm,
        settings: dict[str, str],
    ) -> None:
        rhythm.check(self._method)
        collectives = default_communicator() if comm is None else as_communicator(comm)
        agreed = {"period": str(rhythm.period), **settings}
        super().__init__(
            optimizer,
            model,
            collectives,
            agreed,
            same_start=rhythm.same_start,
            layout=rhythm.layout,
            device=next((p.device for p in model.parameters()), torch.device("cpu")),
        )
        self._period, self._clip_norm = rhythm.period, rhythm.clip_norm
        self._steps = 0

    def flush(self) -> None:
        """Collective: all ranks go on from one model that has everything in it that was computed.

        Then rank 0's model and optimizer are a checkpoint for any number of ranks. Sends the
        model in one dense allreduce.
        """
        with self._exchanging():
            self._flat.read(self._live)
            self._unsent(self._live.vector)
            self._average(self._live.vector)
        self._flat.write(self._live)
        self.restart()

    def memory_state_dict(self) -> dict[str, Any]:
        """A copy of what belongs to this rank: its model, its optimizer's state and the method's."""
        self._flat.read(self._live)
        return {
            **self._identity(),
            "steps": self._steps,
            "model": self._live.vector.clone(),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            **self._own_state(),
        }

    def load_memory_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this rank's part, after ``load_state_dict``, all of it or nothing.

        Raises:
            ConfigurationError: when it is another rank's, or of another number of ranks, model or method.
        """
        groups = [dict] * len(self.optimizer.param_groups)
        form = {
            **{name: Equal(value) for name, value in self._identity().items()},
            "steps": int,
            "model": self._live.vector,
            "optimizer": {"state": dict, "param_groups": groups},
            **self._own_form(),
        }
        problem = unfit(state, form)
        if problem is not None:
            raise ConfigurationError(f"rank {self._collectives.rank}: {problem}")
        self.optimizer.load_state_dict(state["optimizer"])
        self._steps = state["steps"]
        self._live.vector.copy_(state["model"])
        self._flat.write(self._live)
        self._load_own_state(state)

    def _identity(self) -> dict[str, Any]:
        """What a saved state belongs to."""
        ranks, parameters = self._collectives, self._flat.layout.describe()
        return {"method": self._method, "rank": ranks.rank, "size": ranks.size, "parameters": parameters}

    @abstractmethod
    def _meet(self) -> None:
        """Exchange; the parameters are this rank's own before it."""

    def advance(self, **keywords: Any) -> None:
        self._local_step(**keywords)
        self._steps += 1
        if self._steps % self._period == 0:
            with self._exchanging():
                self._meet()

    def _local_step(self, **keywords: Any) -> None:
        limit = math.inf if self._clip_norm is None else self._clip_norm
        if math.isfinite(float(torch.nn.utils.clip_grad_norm_(self._flat.parameters, limit))):
            self.optimizer.step(**keywords)
        else:
            self.stats.skipped += 1

    @contextmanager
    def _exchanging(self) -> Iterator[None]:
        with self.stats.counting(self._collectives), self.stats.phase("exchange"):
            yield

    def _unsent(self, vector: Tensor) -> None:
        """Add to this rank's model what the method still holds back; it is emptied afterwards."""
        return

    def _own_state(self) -> dict[str, Any]:
        return {}

    def _own_form(self) -> dict[str, Form]:
        """What `_own_state` looks like; see `hvd_sketch.saved`."""
        return {}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        return

    def restart(self) -> None:
        self._steps = 0

    def _present(self) -> Flat:
        """A new vector that holds the parameters."""
        vector = self._flat.new()
        self._flat.read(vector)
        return vector
