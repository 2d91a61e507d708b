"""`AsyncSGD`: workers push what they did and pull the model, and nobody waits for anybody else."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, Unpack

import torch

from hvd_sketch.methods.flat import FlatModel
from hvd_sketch.methods.server.connection import connect
from hvd_sketch.methods.server.member import Member
from hvd_sketch.methods.server.rules.base import Rule
from hvd_sketch.methods.server.rules.plain import Plain
from hvd_sketch.methods.server.settings import AsyncOptions, Settings
from hvd_sketch.methods.server.worker import Work
from hvd_sketch.methods.wrapper import Method

Item = TypeVar("Item")


class AsyncSGD(Member, Method):
    """Training with a server, asynchronous unless the rule says otherwise.

    A rank holds the model x. Every other rank is a worker: it takes H local steps from the model
    it was sent, pushes how far it went, u, and is sent the model as it is then. The server's `Rule`
    makes at most one change of x of every push::

        worker j                                        server
        x_j, version <- model
        H steps of any optimizer
        u = x_j before - x_j after      -- PUSH -->     rule: x <- x - ..., version <- version + 1
        x_j, version <- model           <-- MODEL --    x after this push

    A worker waits for one round trip, and for nobody's gradients. There is no collective after the
    construction: a worker that dies is told of by a warning and left out, and may return. The server's
    death is an error on every worker (`ServerLost`): there is no other.

    Both ways can be compressed. ``up``: what the code leaves out waits at the worker. ``down``: the server
    sends the difference to what it has sent this worker so far, for which it keeps a model a worker.

    Evaluate inside ``with optimizer.server_model():``, and save on the server's rank. What does not train, frozen
    parameters and saved buffers, is the server's on all ranks at the construction, and never sent again:
    for BatchNorm's statistics use GroupNorm, or take them from a worker.

    A step whose gradient is not finite is left out on its worker, and counted in ``stats.skipped``;
    a push whose values are not finite is never applied.

    Sent: 16 bytes and the code for every push and for every answer, the whole model at the start.
    Memory of a worker: four vectors of the model's size; of the server: x, and one a worker where ``down``
    or the rule asks for it.

    Args:
        optimizer: takes the local steps; its state stays on its worker. None are taken on a dedicated server.
        model: what it trains; the server's, as it is when its block begins, is what all begin with.
        comm: an mpi4py intracommunicator, ``MPI.COMM_WORLD`` by default, or this process's `place`.
        rule: of the server, see `hvd_sketch.methods.server.rules`; `Plain` by default.
        period: H, in steps; may differ from worker to worker.
        server: the rank that holds x.
        server_works: the server's rank trains as well, and serves in a thread beside.
        up, down: ``Compression.none``, ``topk``, ``sharded`` or ``stride``, or a `Polyline`. The ``clip_norm`` of
            ``up`` clips every local gradient; warm-ups count messages.
        memory: what a worker does with what ``up`` left out: go on from a model that has it, ``"reset"``, or
            from the server's, ``"feedback"``, or forget it, ``"none"``; see `hvd_sketch.methods.server.worker.Work`.
        proximal: λ; adds ``λ (z - x)`` to the gradient of a local step at z, x being the model it was sent.
        samples: how many this worker has, for rules that weigh by it.
        outgoing: transforms of what this worker pushes: `LocalNoise`, or an attack, see
            `hvd_sketch.methods.server.attacks`.
        patience: seconds without a sign of life, which is asked for meanwhile, after which a rank counts as lost.
        restarts: how often the server starts the script again for a lost worker, as a new process, which MPI must
            allow; the script gets its rank from `place` then.
        log: a file for the server to record what came, see `hvd_sketch.methods.server.replay`.
        on_change: called with the version after every change, on the server's rank and in the thread that serves,
            between two messages; to save, or on a dedicated server to look at the model, there.

    Raises:
        ConfigurationError: for settings that cannot work.
        RankMismatchError: alike on all ranks, when models or settings differ.
    """

    _name = "AsyncSGD"

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        comm: Any = None,
        *,
        rule: Rule | None = None,
        **options: Unpack[AsyncOptions],
    ) -> None:
        Method.__init__(self, optimizer)
        settings = Settings(method=self._name, **options)
        self._own(model=model)
        self._settings = settings
        parameters = FlatModel(optimizer, model, settings.layout)
        connection = connect(settings, parameters, model, comm, rule or Plain())
        self._take_part(connection, parameters)
        self._work = Work(
            parameters, connection.up, connection.down, memory=settings.memory, outgoing=settings.outgoing
        )
        self._version = self._steps_since = 0

    def work(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The batches, on a worker; none on a dedicated server, which serves here until no worker is left."""
        return self._engine.work(batches)

    def step(self, closure: Callable[[], Any] | None = None, **keywords: Any) -> Any:
        """One local step, and after every ``period`` of them a push; a closure is evaluated once, before.

        Raises:
            ServerLost: when the server has ended, or is silent for too long.
            TurnedAway: when it does not take this worker's messages.
        """
        self._check_step()
        self._counted.steps += 1
        return super().step(closure, **keywords)

    def flush(self) -> None:
        """Push all that is not sent yet, whole, and go on from the server's model."""
        self._check_step()
        with torch.no_grad():
            self._push(whole=True)

    def memory_state_dict(self) -> dict[str, Any]:
        """A copy of what belongs to this rank: what it has not sent, its optimizer's state, and on the server x."""
        own = self._work.state_dict(self._set_aside)
        return self._saved({"optimizer": copy.deepcopy(self.optimizer.state_dict()), **own})

    def load_memory_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this rank's part, before the block begins and after ``load_state_dict``, all of it or nothing.

        The server's must be loaded; a worker that loads none begins without unsent work of its own.

        Raises:
            ConfigurationError: when it is another rank's, or of another number of ranks, model, method or rule.
        """
        groups = [dict] * len(self.optimizer.param_groups)
        self._load_saved(state, {"optimizer": {"state": dict, "param_groups": groups}, **self._work.state_form()})
        self.optimizer.load_state_dict(state["optimizer"])
        self._work.load_state_dict(state)

    def restart(self) -> None:
        """Forget what is not sent yet, and begin anew at the model's present parameters."""
        self._work.restart()

    def finish(self) -> None:
        super().finish()
        self._work.rest()

    def advance(self, **keywords: Any) -> None:
        """One local step, and after every ``period`` of them a push."""
        norm = torch.nn.utils.clip_grad_norm_(self._flat.parameters, self._settings.clip_norm)
        if math.isfinite(float(norm)):
            self._pull_back()
            self.optimizer.step(**keywords)
        else:
            self._counted.skipped += 1
        self._steps_since += 1
        if self._steps_since == self._settings.period:
            self._push()

    def _pull_back(self) -> None:
        """Add the proximal term to the gradients."""
        if self._settings.proximal:
            for parameter, sent in zip(self._flat.parameters, self._work.held.views, strict=True):
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - sent.to(parameter), alpha=self._settings.proximal)

    def _push(self, *, whole: bool = False) -> None:
        code, payload, finite = self._work.update(whole=whole)
        if not finite:
            self.optimizer.state.clear()
            self._counted.skipped += 1
        with self._counted.phase("model"):
            header, answer = self._engine.client.push(self._version, code, payload)
        if self._engine.store is None:
            self._counted.pushes += 1
            self._counted.dense_bytes += self._work.errors.nbytes
        self._version, self._steps_since = header.number, 0
        self._work.adopt(header, answer)

    def _join(self) -> None:
        with torch.no_grad():
            header, answer = self._engine.client.join(0, fresh=True)
            self._version = header.number
            self._work.adopt(header, answer)

    def _last_push(self) -> None:
        if self._steps_since:
            with torch.no_grad():
                self._push()
