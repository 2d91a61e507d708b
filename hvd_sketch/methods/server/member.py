"""What all methods with a server have in common for whoever uses them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from hvd_sketch import wire
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.methods.flat import Flat, FlatParameters
from hvd_sketch.methods.server.codes import Whole
from hvd_sketch.methods.server.connection import Connection
from hvd_sketch.methods.server.stats import ServerStats
from hvd_sketch.methods.server.store import Store
from hvd_sketch.saved import Equal, Form, unfit


class Member:
    """One rank: a worker, the server, or both. Is used as a context manager, once."""

    _name: ClassVar[str]
    model: torch.nn.Module

    def _take_part(self, connection: Connection, parameters: FlatParameters) -> None:
        self._engine, self._flat = connection.engine, parameters
        store = self._engine.store
        self._counted = ServerStats() if store is None else store.stats
        self._inside = False
        self._set_aside: Flat | None = None
        self._known = 0 if store is None else self._present()[1]

    @property
    def stats(self) -> ServerStats:
        """What this rank counted."""
        self._counted.bytes_sent, self._counted.bytes_received = self._engine.traffic
        return self._counted

    @property
    def is_worker(self) -> bool:
        """Whether this rank trains; a dedicated server does not."""
        return self._engine.is_worker

    @contextmanager
    def server_model(self) -> Iterator[torch.nn.Module]:
        """Inside, this rank's model holds the server's as it is now; afterwards its own is back, to the bit.

        Raises:
            ServerLost: when the server has ended, or is silent for too long.
            RuntimeError: in ``on_change`` beside a worker, whose model it would take away while it trains.
        """
        if self._engine.beside_worker:
            raise RuntimeError(
                "server_model() in on_change would change the model that this rank's worker trains; look at it "
                "between the worker's steps, or use a dedicated server"
            )
        own, seen = self._flat.new(), self._flat.new()
        self._flat.read(own)
        if self._engine.store is not None and not (self._engine.is_worker and self._inside):
            seen.vector.copy_(self._engine.store.model)
        else:
            _, payload = self._engine.client.pull()
            seen.vector.copy_(Whole(seen.vector.numel(), seen.vector.dtype).values(payload))
        self._flat.write(seen)
        self._set_aside = own
        try:
            yield self.model
        finally:
            self._set_aside = None
            self._flat.write(own)

    def finish(self) -> None:
        """End as the block does: send what this worker has not pushed, or serve until no worker is left.

        The server's rank then has the last model in its own.

        Raises:
            ServerLost, WorkersLost: when nobody is left on the other side.
        """
        if not self._inside:
            return
        if self._engine.is_worker:
            self._last_push()
        self._engine.finish()
        self._inside = False
        if self._engine.store is not None:
            self._show(self._engine.store)

    def __enter__(self) -> Self:
        if self._engine.is_over:
            raise RuntimeError(f"this {self._name} is finished: make a new one, on all ranks")
        if self._engine.store is not None:
            self._serve_changes(self._engine.store)
        self._engine.begin()
        self._inside = True
        try:
            if self._engine.is_worker:
                self._join()
        except BaseException:
            self._inside = False
            self._engine.leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._inside = False
            self._engine.leave()

    def _check_step(self) -> None:
        """Raise where a step would be lost."""
        name = self._name
        if not self._engine.is_worker:
            raise RuntimeError(
                f"{name}: this rank is the server and takes no steps; loop over work(...), which serves here, or "
                "give server_works=True"
            )
        if not self._inside:
            raise RuntimeError(f"{name}: steps belong inside `with` this optimizer, where the server answers")
        if self._set_aside is not None:
            raise RuntimeError(f"{name}: a step inside server_model() would be lost when the block ends")

    def _saved(self, own: dict[str, Any]) -> dict[str, Any]:
        """A rank's state, with the server's if this is its rank.

        Raises:
            RuntimeError: in ``on_change`` beside a worker, which may be in the middle of a step.
        """
        if self._engine.beside_worker:
            raise RuntimeError(
                "a state saved in on_change would be in the middle of a step of this rank's worker; save between its "
                "steps, or use a dedicated server"
            )
        server = {} if self._engine.store is None else {"server": self._engine.server_state()}
        return {**self._identity(), **own, **server}

    def _load_saved(self, state: dict[str, Any], own: dict[str, Form]) -> None:
        """Look at the whole of a saved state, of which a rank's own part has this form; load the server's."""
        if self._inside:
            raise RuntimeError(f"load the state of {self._name} before its block begins")
        store = self._engine.store
        identity = {name: Equal(value) for name, value in self._identity().items()}
        problem = unfit(state, {**identity, **own, **({} if store is None else {"server": store.state_form()})})
        if problem is not None:
            raise ConfigurationError(f"rank {self._engine.rank}: {problem}")
        if store is not None:
            store.load_state_dict(state["server"])
            self._show(store)

    def _show(self, store: Store) -> None:
        """Put the server's model into this rank's."""
        shown = self._flat.new()
        shown.vector.copy_(store.model)
        self._flat.write(shown)
        self._known = self._present()[1]

    def _serve_changes(self, store: Store) -> None:
        """Serve what a script has put into this rank's model since the server's was read or loaded, if it has."""
        present, checksum = self._present()
        if checksum != self._known:
            store.model.copy_(present)

    def _present(self) -> tuple[Tensor, int]:
        """This rank's model, and its checksum."""
        present = self._flat.new()
        self._flat.read(present)
        return present.vector, wire.checksum(present.vector.view(torch.uint8))

    def _identity(self) -> dict[str, Any]:
        """What a saved state belongs to."""
        engine, parameters = self._engine, self._flat.layout.describe()
        return {"method": self._name, "rank": engine.rank, "size": engine.size, "parameters": parameters}

    @abstractmethod
    def _join(self) -> None:
        """As a worker, get the model to begin with."""

    @abstractmethod
    def _last_push(self) -> None:
        """As a worker, send what has not been pushed."""
