"""The exchange of a DistributedDataParallel model, which takes its buckets of gradients as they come."""

# without postponed annotations: DistributedDataParallel compares those of a hook

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket  # torch.distributed's own, which it does not export to type checkers
from torch.autograd import Variable

from hvd_sketch.comm import as_communicator
from hvd_sketch.comm.hosts import Asked, find_hosts
from hvd_sketch.compatibility import check_momentum, check_steps_once
from hvd_sketch.compressors import Compressor
from hvd_sketch.error_feedback.anticipate import Anticipate
from hvd_sketch.error_feedback.default import Default, follow, settle
from hvd_sketch.error_feedback.passes import Passes
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.exchange import Exchange
from hvd_sketch.exchange.gradients import shared_state, take_over, watch
from hvd_sketch.exchange.joining import attend
from hvd_sketch.exchange.scaling import LossScale
from hvd_sketch.frontends.arguments import check_hierarchical
from hvd_sketch.frontends.grouped import grouped
from hvd_sketch.methods.wrapper import HOROVODS_MODULE


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
    stays as it is. Such steps do not count for schedules.

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
        ConfigurationError: when a setting cannot work, before any communication.
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
        optimizer = _innermost(optimizer)
        _check(compression, optimizer)
        compression, feedback = settle(compression, optimizer, Default.OF_COMPRESSION, averages=True, corrects=False)
        named = dict(_numbered(optimizer) if named_parameters is None else named_parameters)
        self._optimizer, self._scale, self._factor = weakref.ref(optimizer), LossScale(grad_scaler), 1.0
        trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        layout = compression.layout(trained.items())
        comm = as_communicator(dist.group.WORLD if process_group is None else process_group)
        device = next(iter(trained.values())).device
        hosts, note = find_hosts(comm, check_hierarchical(hierarchical, compression, feedback))
        make = partial(compression.exchange, layout, comm, average=True, device=device)
        self.exchange = grouped(lambda hosts: make(hosts=hosts), hosts, note)
        held = self._optimizer
        self.exchange.watch(trained, lambda: getattr(held(), "param_groups", ()))
        self.exchange.drift.parameters = ()  # which may be ahead while backward runs, on each rank elsewhere
        self._parameters = [trained[slot.name] for slot in layout.slots]
        self._positions = {parameter: position for position, parameter in enumerate(self._parameters)}
        self._used: set[int] = set()
        self._stale: dict[int, Tensor] = {}
        self._views: dict[int, Tensor] = {}
        self._open: list[tuple[torch.futures.Future[Tensor], Tensor]] = []
        self._undo: Callable[[], None] | None = None
        self._stepping = self._unstepped = self._ever_stepped = self._added_to = self._joined = False
        self._passes: Passes | None = None
        if isinstance(feedback, Anticipate):
            self._passes = follow(optimizer, feedback, self, self.exchange, trained)
        self._watch(optimizer)

    def flush(self) -> None:
        """Send everything in the next step, so that a checkpoint after it needs no memory."""
        self.exchange.flush()

    def memory_state_dict(self) -> dict[str, Any]:
        """What this rank has not sent yet; save it on every rank, beside the model's and the optimizer's state."""
        self._take_back_what_was_cleared()
        return self.exchange.state_dict()

    def load_memory_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this rank's memory, after the optimizer's state; see `Exchange.load_state_dict`."""
        self._undo = None
        self.exchange.load_state_dict(state)

    @torch.no_grad()
    def receive(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Take a bucket of gradients; the future completes with that of the last one.

        Raises:
            ConfigurationError, RankMismatchError: see `Exchange.run`; or for a parameter that is not known.
        """
        buffer = bucket.buffer()
        future = torch.futures.Future[Tensor](devices=[] if buffer.device.type == "cpu" else [buffer.device])
        if not self._open:
            self._begin()
        self._open.append((future, buffer))
        if buffer.is_sparse:
            self._refuse_sparse(bucket)
        else:
            self._take(dict(zip(map(self._position_of, bucket.parameters()), bucket.gradients(), strict=True)))
        if bucket.is_last():
            self._finish()
        return future

    def _begin(self) -> None:
        """The first bucket of a step."""
        optimizer = self._optimizer()
        self._factor = 1.0 if optimizer is None else self._scale.by_hand(optimizer)
        self._joined = torch._C._current_graph_task_id() < 0  # there is no backward, the others' buckets are matched
        if not self._joined and not self._used:
            self._used = set(self._positions.values())
        if self._joined or self._stepping:
            self._undo = None
        self._added_to = self._undo is not None  # gradients that were exchanged before: they count with these
        if not (self._joined or self._stepping or self._added_to):
            self._undo = self.exchange.snapshot()
        self._unstepped = not self._joined

    def _take(self, gradients: Mapping[int, Tensor]) -> None:
        """Hand in what was used on this rank; the rest is zero, or left over from an earlier pass and comes last."""
        self._views.update(gradients)
        used = {position: gradient for position, gradient in gradients.items() if position in self._used}
        unused = {position: gradient for position, gradient in gradients.items() if position not in used}
        self._stale.update((position, gradient) for position, gradient in unused.items() if bool(gradient.any()))
        self.exchange.submit_many(used, 1.0 / self._factor)

    def _finish(self) -> None:
        """Exchange, write the update into all buckets, and complete them."""
        exchange = self.exchange
        self._back_at_the_model()
        exchange.submit_many(self._stale, 1.0 / self._factor)
        exchange.only_decay = list(self._stale)
        exchange.frozen = [at for at, parameter in enumerate(self._parameters) if not parameter.requires_grad]
        opened, self._open = self._open, []
        try:
            if self._joined:
                attend(exchange)
            else:
                exchange.run()
                exchange.write_update(self._views, self._factor)
        finally:
            self._used.clear()
            self._stale.clear()
            self._views.clear()
        if exchange.void:
            self._undo = self._undo if self._added_to else None
            if self._stepping:
                self._clear_after_backward()
        for future, buffer in opened:
            future.set_result(buffer)

    def _position_of(self, parameter: Tensor) -> int:
        position = self._positions.get(parameter)
        if position is None:
            raise ConfigurationError(
                f"the model trains a parameter of shape {tuple(parameter.shape)} that the optimizer does not hold; "
                "give State named_parameters=model.named_parameters(), or call hvd_sketch.ddp.register"
            )
        return position

    def _refuse_sparse(self, bucket: GradBucket) -> None:
        """Tell all ranks, in the step, that a gradient is sparse."""
        slots = self.exchange.layout.slots
        names = ", ".join(slots[self._position_of(parameter)].name for parameter in bucket.parameters())
        self.exchange.fail_together(f"parameter {names!r} has a sparse gradient; make its embedding with sparse=False")

    def _watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Be told, while the model lives, of gradients that are computed and of steps."""
        watch(self, self._parameters)
        reference = weakref.ref(self)
        for position, parameter in enumerate(self._parameters):
            parameter.register_hook(_told(reference, State._computed, position))
        optimizer.register_step_pre_hook(_told(reference, State._before_step))
        optimizer.register_step_post_hook(_told(reference, State._after_step))
        optimizer.register_load_state_dict_post_hook(_told(reference, State._restart))

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
        return shared_state(self._parameters, self._optimizer())

    def take_over(self, state: dict[str, Any]) -> None:
        """Go on with another rank's `shared_state`; what is unsent here stays."""
        take_over(state, self._parameters, self._optimizer())

    def _back_at_the_model(self) -> None:
        """End the step ahead, if parameters are."""
        if self._passes is not None:
            self._passes.finish()

    def _computed(self, position: int) -> None:
        """Backward is about to add to a gradient."""
        if not self._used:
            self._take_back_what_was_cleared()
        self._used.add(position)

    def _take_back_what_was_cleared(self) -> None:
        """Undo what was exchanged since the last step if the update is gone; as long as it is there, it counts."""
        if self._undo is None or any(p.grad is not None and bool(p.grad.any()) for p in self._parameters):
            return
        self._undo()
        self._undo = None
        if not self._ever_stepped:
            warnings.warn(
                "hvd_sketch: gradients were cleared before a step of the optimizer that State was given, and count as "
                "never exchanged; give State the very optimizer that steps",
                stacklevel=2,
            )

    def _before_step(self) -> None:
        """What was exchanged is stepped with, unless it is void."""
        self._back_at_the_model()
        self._stepping = self._ever_stepped = True
        if self._unstepped and self.exchange.void:
            self._clear()
            self._take_back_what_was_cleared()
        self._undo, self._unstepped = None, False

    def _after_step(self) -> None:
        self._back_at_the_model()
        self._stepping = self._unstepped = False

    def _restart(self) -> None:
        """The optimizer has loaded a state: what is unsent belongs to what was before."""
        self._back_at_the_model()
        self._undo = None
        self.exchange.reset()

    def _clear(self) -> None:
        """Leave an optimizer nothing to step with."""
        for parameter in self._parameters:
            parameter.grad = None

    def _clear_after_backward(self) -> None:
        """The same for backward inside of a step's closure, once the model has put the gradients in their place."""
        queue = Variable._execution_engine.queue_callback
        queue(lambda: queue(self._clear))  # behind the model's own, which is queued after its last hook


def _told(reference: "weakref.ref[State]", what: Callable[..., None], *arguments: Any) -> Callable[..., None]:
    """A hook that tells a state, while it lives."""

    def hook(*_: Any) -> None:
        state = reference()
        if state is not None:
            what(state, *arguments)

    return hook


def _innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The one that frameworks put their own around."""
    if type(optimizer).__module__ == HOROVODS_MODULE:
        raise ConfigurationError(
            "the optimizer is a DistributedOptimizer, which exchanges by itself; give the plain one to the hook, or "
            "leave DistributedDataParallel away"
        )
    inner = getattr(optimizer, "optimizer", None)
    return _innermost(inner) if isinstance(inner, torch.optim.Optimizer) else optimizer


def _check(compression: Any, optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(compression, Compressor):
        raise ConfigurationError(
            f"compression={compression!r} is none that sparsifies: use hvd_sketch.Compression.auto() or another; for "
            "plain averages register no hook, and for half precision PyTorch's own fp16_compress_hook"
        )
    check_steps_once(optimizer)
    check_momentum(compression.momentum, optimizer)


def _numbered(optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, Tensor]]:
    """An optimizer's parameters, by group and number."""
    for i, group in enumerate(optimizer.param_groups):
        yield from ((f"{i}.{j:04d}", parameter) for j, parameter in enumerate(group["params"]))
