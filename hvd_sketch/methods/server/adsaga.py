"""`ADSAGA`: asynchronous variance reduction for a finite sum that is spread over workers."""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Iterator
from typing import Any, Unpack

import torch
from torch import Tensor

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.methods.flat import HOST, FlatParameters, whole
from hvd_sketch.methods.server.codes import Whole
from hvd_sketch.methods.server.connection import connect
from hvd_sketch.methods.server.member import Member
from hvd_sketch.methods.server.message import Note
from hvd_sketch.methods.server.rules.saga import OnLost, Saga
from hvd_sketch.methods.server.settings import ServerOptions, Settings
from hvd_sketch.settings import check_given, given_numbers

_LARGE_TABLE = 2**30  # bytes


class ADSAGAOptions(ServerOptions, total=False):
    """Further keywords of `ADSAGA`."""

    server_works: bool


class ADSAGA(Member):
    """SAGA with a server and workers that each have a part of the data.

    For ``f = 1/n sum of f_l``, the n components shared out among the workers. Worker j keeps the last
    gradient a_l of each of its components l, zero at first; the server keeps x and the mean ū of all
    of them::

        worker   l at random of its own;  g = gradient of f_l at the x it has;  h = g - a_l, a_l <- g
        server   x <- x - rate (h + ū),  then  ū <- ū + h / n,  and the worker gets x

    Gradients lose their noise as x settles, so x goes on to the exact minimiser at a linear rate,
    however stale they are; asynchronous SGD at the same rate stops at a distance. It is for convex
    models: linear and logistic regression and the like. On deep networks variance reduction seldom helps.

    Usage::

        saga = hvd_sketch.ADSAGA(model, components=len(blocks), smoothness=largest_curvature)
        with saga:
            for l in saga.work(10_000):
                model.zero_grad()
                loss(model, blocks[l]).backward()
                saga.step(l)

    A component is one sample or a fixed block of samples, of which it has the mean gradient. Its loss must be
    the same function every time: no other batches, no augmentation, no dropout, no BatchNorm in
    training mode. Regularisation belongs into every f_l. There is no momentum. The speed is that of the least
    frequent worker: give a slow one fewer components.

    a_l changes only when the server has applied h; a gradient that is not finite is not sent.
    With ``on_lost="remove"`` the components of a lost worker leave the sum until it returns; else they
    stay in it, stale. A checkpoint has a worker's table and the server's ū; they must be of the same
    moment, as at the end of a block, and are refused if not. A worker that loads none begins with an empty table.

    Sent: 16 bytes and the vector, in the model's dtype, up and down. Memory of a worker: its
    components times the model; of the server: x, ū, and a sum in float64 for each worker.
    Source: Glasgow and Wootters, "Asynchronous Distributed Optimization with Stochastic Delays"
    (AISTATS 2022), arXiv 2009.10717.

    Args:
        model: what is trained; the server's is what all begin with. float64 to converge beyond 1e-7.
        components: of this worker, at least 1; on a dedicated server any number.
        smoothness: the largest curvature of a component, for a linear model the largest squared norm of a sample.
        rate: the learning rate; ``1 / (6 smoothness)`` when not given, a choice of ours.
        seed: of the draws.
        on_lost: ``"keep"`` or ``"remove"``.
        server: the rank that holds x.
        server_works: that rank is a worker as well.
        comm, patience, restarts, log, on_change: see `AsyncSGD`.

    Raises:
        ConfigurationError: for settings that cannot work.
        RankMismatchError: alike on all ranks, when models or settings differ.
    """

    _name = "ADSAGA"

    def __init__(
        self,
        model: torch.nn.Module,
        comm: Any = None,
        *,
        components: int,
        smoothness: float | None = None,
        rate: float | None = None,
        seed: int = 0,
        on_lost: OnLost = "keep",
        **options: Unpack[ADSAGAOptions],
    ) -> None:
        check_given(ADSAGA.__init__, locals())
        self._average_of = rule = Saga(_rate(smoothness, rate), on_lost)
        settings = Settings(method=self._name, samples=components, **options)
        self.model = model
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        parameters = FlatParameters(named, whole(named.items()), HOST)
        self._take_part(connect(settings, parameters, model, comm, rule), parameters)
        self._components = components if self.is_worker else 0
        self._table = _table(self._components, parameters)
        self._generator = torch.Generator().manual_seed(seed * self._engine.size + self._engine.rank)
        self._gradient, self._held = parameters.new(), parameters.new()
        self._whole = Whole(parameters.layout.total, parameters.dtype)
        self._version, self._moment = 0, secrets.randbits(31) << 32
        self._fresh = True

    @property
    def table(self) -> Tensor:
        """The last gradients of this worker's components, ``(components, d)``, in the model's dtype."""
        return self._table

    @property
    def average(self) -> Tensor:
        """On the server's rank ū, float64."""
        return self._average_of.average

    @given_numbers
    def work(self, steps: int) -> Iterator[int]:
        """So many components of this worker, drawn at random; none on a dedicated server, which serves here."""
        return self._engine.work(self._draw() for _ in range(steps))

    def _draw(self) -> int:
        return int(torch.randint(self._components, (1,), generator=self._generator, device="cpu"))

    @torch.no_grad()
    @given_numbers
    def step(self, component: int) -> None:
        """Push what is new in the gradient of a component, which the parameters have in ``.grad``; get x.

        Raises:
            ConfigurationError: for a component that this worker does not have.
            ServerLost, TurnedAway: see `AsyncSGD.step`.
        """
        self._check_step()
        if not 0 <= component < self._components:
            raise ConfigurationError(
                f"rank {self._engine.rank}: component must be from 0 to {self._components - 1}, got {component}; "
                "number the components of each worker from 0"
            )
        self._counted.steps += 1
        self._flat.read_gradients(self._gradient)
        gradient, last = self._gradient.vector, self._table[component]
        if not gradient.isfinite().all():
            self._counted.skipped += 1
            return
        payload = (gradient - last).view(torch.uint8)
        with self._counted.phase("model"):
            header, answer = self._engine.client.push(self._version, Whole.number, payload)
        if header.note == Note.ACCEPTED:
            last.copy_(gradient)
            self._moment += 1
        if self._engine.store is None:
            self._counted.pushes += 1
            self._counted.dense_bytes += payload.numel()
        self._adopt(header.number, answer)

    def memory_state_dict(self) -> dict[str, Any]:
        """A copy of what belongs to this rank: its table, its draws, and on the server x and ū."""
        draws = self._generator.get_state()
        return self._saved({"table": self._table.clone(), "moment": self._moment, "draws": draws})

    def load_memory_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this rank's part, before the block begins, all of it or nothing.

        The server's must be loaded if any table is; of another moment they are refused when the block begins.

        Raises:
            ConfigurationError: when it is another rank's, of another number of ranks, or of other components.
        """
        draws = self._generator.get_state()
        self._load_saved(state, {"table": self._table, "moment": int, "draws": draws})
        self._table.copy_(state["table"])
        self._generator.set_state(state["draws"])
        self._moment, self._fresh = state["moment"], False

    def _join(self) -> None:
        header, answer = self._engine.client.join(self._moment, fresh=self._fresh)
        self._adopt(header.number, answer)

    def _last_push(self) -> None:
        return

    def _adopt(self, version: int, answer: Tensor) -> None:
        self._version = version
        self._held.vector.copy_(self._whole.values(answer))
        self._flat.write(self._held)


def _rate(smoothness: float | None, rate: float | None) -> float:
    if smoothness is None and rate is None:
        raise ConfigurationError("ADSAGA: give smoothness, the largest curvature of a component, or a rate")
    for name, value in (("smoothness", smoothness), ("rate", rate)):
        if value is not None and not 0.0 < value < math.inf:
            raise ConfigurationError(f"ADSAGA: {name} must be above 0 and finite, got {value}")
    return rate if rate is not None else 1.0 / (6.0 * float(smoothness or 1.0))


def _table(components: int, parameters: FlatParameters) -> Tensor:
    table = torch.zeros(components, parameters.layout.total, dtype=parameters.dtype, device=HOST)
    if table.nbytes > _LARGE_TABLE:
        warnings.warn(
            f"ADSAGA: the table of {components} gradients takes {table.nbytes / 2**30:.1f} GiB; larger blocks as "
            "components make fewer",
            RuntimeWarning,
            stacklevel=3,
        )
    return table
