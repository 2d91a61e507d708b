"""The exchange of a DistributedDataParallel model, which takes its buckets of gradients as they come."""

# without postponed annotations: DistributedDataParallel compares those of a hook

import logging
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import GradBucket  # torch.distributed's own, which it does not export to type checkers

from hvd_sketch.comm.hosts import Asked
from hvd_sketch.compressors import Compressor
from hvd_sketch.error_feedback.anticipate import Anticipate
from hvd_sketch.error_feedback.default import follow
from hvd_sketch.error_feedback.passes import Passes
from hvd_sketch.exchange import Exchange
from hvd_sketch.exchange.gradients import shared_state, take_over, tell_unfrozen, watch, watches
from hvd_sketch.exchange.scaling import LossScale
from hvd_sketch.frontends.ddp_arguments import check, frozen_of, innermost, numbered, settled
from hvd_sketch.frontends.ddp_buckets import Buckets, after_backward
from hvd_sketch.frontends.ddp_exchange import Compared, make_exchange, refuse_sparse
from hvd_sketch.frontends.ddp_join import Missed, keeping_memories, keeps_memories
from hvd_sketch.frontends.ddp_steps import (
    Steps,
    Unstepped,
    check_listens,
    leave,
    listen,
    listeners,
    teller,
    warn_of_local_step,
)

_logger = logging.getLogger("hvd_sketch")

_WRAPPED_FROZEN = (
    "the model was wrapped and registered; do so on all ranks first, then wrap model.module in "
    "DistributedDataParallel again, and register"
)


class State:
    """The exchange of one DistributedDataParallel model, for ``model.register_comm_hook(State(…), hook)``.

    The buckets of a backward pass are handed in as they come, and the last one completes them all: after
    ``backward()`` every ``p.grad`` is the global update, times the loss scale if there is one. Passes inside
    ``no_sync()`` count with the next one outside of it. A parameter that no rank has used is left alone.

    An update that is not stepped with and then cleared is as if it had never been exchanged. In a void step
    (see `Exchange`) gradients are not a number on all ranks, so that a ``GradScaler`` lowers its scale, and the
    optimizer's step leaves parameters and state alone.

    Gradients are anticipated where the compressor's ``anticipate`` has it so, see `Compressor`.

    Sent: what the compressor sends; zeros by ranks that have run out of data inside ``model.join()``, whose memory
    stays as it is. Such steps do not count for schedules. In the first step of all after them, the optimizer's
    state of a rank that missed the fewest, which all others take over.

    Args:
        compression: one of `hvd_sketch.Compression` that sparsifies.
        optimizer: the one that steps the model's parameters, with or without a framework's own around it.
        named_parameters: all parameters that the model trains, for `exclude` and for messages; by default those
            of the optimizer, by number.
        process_group: the model's, if it is not the default one.
        grad_scaler: the scaler in use, if there are several in the process.
        hierarchical: as for `hvd_sketch.DistributedOptimizer`.

    Attributes:
        exchange: for its ``stats``.

    Raises:
        ConfigurationError: when a setting cannot work, before any communication; or in backward, when the model has
            parameters in common with another one that was registered later.
    """

    exchange: Exchange

    def __init__(
        self,
        compression: Compressor,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        *,
        process_group: Any = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        hierarchical: Asked = None,
    ) -> None:
        optimizer = innermost(optimizer)
        named = dict(numbered(optimizer) if named_parameters is None else named_parameters)
        trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        check(compression, optimizer, trained)
        self._frozen = frozen_of(named, trained)
        compression, feedback = settled(compression, optimizer, trained)
        self._scale, self._factor = LossScale(grad_scaler), 1.0
        self.exchange = make_exchange(compression, feedback, trained, process_group, hierarchical)
        self._parameters = [trained[slot.name] for slot in self.exchange.layout.slots]
        self._positions = {parameter: position for position, parameter in enumerate(self._parameters)}
        self._buckets = Buckets(self._positions)
        self._steps = Steps(optimizer, self._positions)
        self._unstepped = Unstepped(self.exchange, self._parameters)
        self._missed = Missed(self.exchange)
        self._fresh = self._local = self._added_to = self._joined = False
        self._compared = Compared(self.exchange, trained, self._steps)
        self._succeed()
        self._passes: Passes | None = None
        if isinstance(feedback, Anticipate):
            self._passes = follow(optimizer, feedback, self, self.exchange, trained)
        self._watch(optimizer)

    def __reduce__(self) -> Any:
        """A copy of the model, or one from a file, is another model: PyTorch gives it no hook."""
        return _left_behind, ()

    def flush(self) -> None:
        """Send everything in the next step, so that a checkpoint after it needs no memory."""
        self.exchange.flush()

    def memory_state_dict(self) -> dict[str, Any]:
        """What this rank has not sent yet; save it on every rank, beside the model's and the optimizer's state."""
        self._take_back_what_was_cleared()
        return self._unstepped.saved()

    def load_memory_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this rank's memory, before or after the optimizer's state; see `Exchange.load_state_dict`."""
        self._unstepped.settle()
        self.exchange.load_state_dict(state)

    @torch.no_grad()
    def receive(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Take a bucket of gradients; the future completes with that of the last one.

        Raises:
            ConfigurationError, RankMismatchError: see `Exchange.run`; or for a parameter that is not known.
        """
        if not self._buckets.promised:
            self._begin()
        future = self._buckets.promise(bucket)
        if bucket.buffer().is_sparse:
            refuse_sparse(self.exchange, self._buckets.positions(bucket))
        else:
            self.exchange.submit_many(self._buckets.take(bucket), 1.0 / self._factor)
        if bucket.is_last():
            self._finish()
        return future

    def _begin(self) -> None:
        """The first bucket of a step."""
        check_listens(self)
        optimizer = self._steps.given
        self._factor = 1.0 if optimizer is None else self._scale.by_hand(optimizer)
        if self._scale.is_guessed:
            self.exchange.flush()  # nothing is kept that may be of another scale
        self._joined = torch._C._current_graph_task_id() < 0  # there is no backward, the others' buckets are matched
        if not self._joined and not self._buckets.used:
            self._buckets.used.update(self._positions.values())
        if self._joined:
            self._unstepped.settle()
        self._added_to = self._unstepped.pending  # gradients that were exchanged before: they count with these
        if not (self._joined or self._added_to):
            self._unstepped.begin()
        self._fresh = not self._joined

    def _finish(self) -> None:
        """Exchange, write the update into all buckets, and complete them."""
        exchange, buckets = self.exchange, self._buckets
        self._back_at_the_model()
        exchange.submit_many(buckets.stale, 1.0 / self._factor)
        exchange.only_decay = list(buckets.stale)
        exchange.frozen = [at for at, parameter in enumerate(self._parameters) if not parameter.requires_grad]
        promised = buckets.promised
        try:
            if self._joined:
                self._missed.attend()
            else:
                tell_unfrozen(exchange, self._frozen, _WRAPPED_FROZEN)
                exchange.run()
                exchange.write_update(buckets.views, self._factor)
                self._missed.catch_up(self._steps.given)
        finally:
            buckets.close()
            self._compared.forget()
        if exchange.void:
            if not self._added_to:
                self._unstepped.settle()
            if self._steps.inside:
                after_backward(self._clear)
        if not self._joined:
            after_backward(self._unstepped.note)
        for future, buffer in promised:
            future.set_result(buffer)

    def _watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Be told, while the model lives, of gradients that are computed and of steps."""
        watch(self, self._parameters)
        reference = weakref.ref(self)
        for position, parameter in enumerate(self._parameters):
            parameter.register_hook(teller(reference, State._computed, position))
        optimizer.register_load_state_dict_post_hook(teller(reference, State._restart))
        listen(self)

    def _succeed(self) -> None:
        """End those of these parameters that there are: the model was wrapped again, as for a second fit."""
        for other in listeners():
            if not self._positions.keys().isdisjoint(other._positions):
                leave(other)
                if other._passes is not None:
                    other._passes.retire()

    def gradient_computed(self, parameter: Tensor) -> None:
        """Called by backward."""
        if self._passes is not None:
            self._passes.took(parameter)

    def present_exchange(self) -> Exchange:
        """The exchange; an update that was cleared in place of being stepped with has left no trace in it."""
        self._take_back_what_was_cleared()
        return self.exchange

    def shared_state(self) -> dict[str, Any]:
        """Parameters and the optimizer's state, the same on all ranks; not copied."""
        return shared_state(self._parameters, self._steps.given)

    def take_over(self, state: dict[str, Any]) -> None:
        """Go on with another rank's `shared_state`; what is unsent here stays."""
        with keeping_memories():
            take_over(state, self._parameters, self._steps.given)

    def _back_at_the_model(self) -> None:
        """End the step ahead, if parameters are."""
        if self._passes is not None:
            self._passes.finish()

    def _computed(self, position: int) -> None:
        """Backward is about to add to a gradient."""
        if not self._buckets.used:
            self._take_back_what_was_cleared()
            self._compared.note(self.exchange)
        self._buckets.used.add(position)

    def _take_back_what_was_cleared(self) -> None:
        """Undo what was exchanged since the last step if the update is gone; as long as it is there, it counts."""
        if self._unstepped.take_back_cleared() and not self._steps.ever:
            warnings.warn(
                "hvd_sketch: gradients were cleared before any step of an optimizer, and count as never exchanged; "
                "step by a torch.optim.Optimizer, which tells of it",
                stacklevel=2,
            )

    def step_begins(self, optimizer: torch.optim.Optimizer) -> None:
        """What was exchanged is stepped with, unless it is void or cleared."""
        if not self._steps.begin(optimizer):
            return
        self._back_at_the_model()
        self._local = bool(self._buckets.used) and not self._fresh
        if self._fresh:
            self._scale.settle(optimizer)
        if self._fresh and self.exchange.void:
            self._clear()
        self._unstepped.take_back_cleared()
        self._fresh = False

    def step_ends(self, optimizer: torch.optim.Optimizer) -> None:
        """The step is over, by the optimizer that was given, or by one that has taken its place."""
        stepped = self._steps.end(optimizer)
        if not stepped:
            return
        self._unstepped.step(stepped)
        self._back_at_the_model()
        self._fresh = False
        if self._local and self._buckets.used:
            warn_of_local_step()
        if self._steps.succeeded_by(optimizer):
            optimizer.register_load_state_dict_post_hook(teller(weakref.ref(self), State._restart))
            if self._passes is not None and watches(self, self._parameters[0]):
                self._passes.end(
                    f"{type(optimizer).__name__} steps the model now in place of the optimizer that was registered; "
                    "wrap the model in DistributedDataParallel again and register that one"
                )

    def _restart(self) -> None:
        """The optimizer has loaded a state: what is unsent belongs to what was before, unless it was just loaded."""
        if keeps_memories():
            return
        self._back_at_the_model()
        self._unstepped.settle()
        if not self.exchange.is_as_loaded:
            self.exchange.reset()

    def _clear(self) -> None:
        """Leave an optimizer nothing to step with."""
        for parameter in self._parameters:
            parameter.grad = None


def _left_behind() -> None:
    _logger.warning(
        "hvd_sketch: a copy of a DistributedDataParallel model, or one from a file, would average its gradients "
        "densely, for PyTorch leaves communication hooks behind; to train it, call hvd_sketch.ddp.register for it"
    )
