"""Parameters ahead for the passes of training alone, whatever the script around them does."""

from __future__ import annotations

import logging
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointFunction

from hvd_sketch.shards import gather_anew

_log = logging.getLogger("hvd_sketch")


class Moved(Protocol):
    """Moves parameters ahead and back."""

    is_ahead: bool

    def forth(self) -> None: ...

    def back(self) -> None: ...


class Passes:
    """Keeps parameters ahead from a forward in training to the end of its backward, and at the model x otherwise.

    A forward counts as training where the module, or what in it holds parameters, is in training mode and gradients
    are enabled. Evaluation, a forward without gradients and ``state_dict`` in between meet x, and so does what a
    script reads after backward. What was computed ahead is differentiated ahead: several forwards before their
    backwards, a graph that is retained, both kinds of activation checkpointing. After a backward that makes a graph
    itself (``create_graph=True``) the parameters stay ahead until `finish`.

    A gradient taken at x, by a model in evaluation mode, a scripted one or without a module, is as good as without
    error feedback; it is told once. A forward that is traced is left alone, and so is a parametrized weight that is
    read outside of forwards: it is computed where the parameters are. A script that changes parameters inside
    forward changes them ahead: from then on this keeps out of the way, and says so.

    Args:
        moved: moves the parameters.
        names: the parameters, and what to call them.
        moves: whether there is anything to move for.

    Raises:
        RuntimeError: in a backward through what was computed at x while others' graphs are ahead.
    """

    def __init__(self, moved: Moved, names: Mapping[Tensor, str], moves: Callable[[], bool]) -> None:
        self._moved, self._names, self._moves = moved, names, moves
        self._holders: WeakKeyDictionary[Module, list[Module]] = WeakKeyDictionary()
        self._outer: Module | None = None
        self._depth, self._task = 0, -1
        self._trains = self._resumes = self._stays = self._told = self._suspended = False
        self._watch: Callable[[Module], None] = _nothing
        self._versions: list[int] = []
        self._guards = ExitStack()
        _follow(self)

    @contextmanager
    def suspended(self, watch: Callable[[Module], None]) -> Iterator[None]:
        """Inside, forwards are left alone; ``watch`` is told of each module's."""
        before, self._suspended, self._watch = self._suspended, True, watch
        try:
            yield
        finally:
            self._suspended, self._watch = before, _nothing

    def finish(self) -> None:
        """Back to x, for the step or whoever looks."""
        self._stays = False
        self._back()

    def retire(self) -> None:
        """Back to x for good."""
        self.finish()
        self._suspended = True

    def end(self, why: str) -> None:
        """The same, and say why."""
        self.retire()
        _log.warning("hvd_sketch: from now on gradients are computed without the step ahead: %s", why)

    def took(self, parameter: Tensor) -> None:
        """A gradient was computed; say so if it was not ahead."""
        if not (self._told or self._moved.is_ahead or self._suspended) and self._moves():
            self._told = True
            _log.warning(
                "hvd_sketch: the gradient of %r was computed without the step ahead of error feedback: that takes a "
                "forward of a torch.nn.Module, not scripted, in training mode, or `with optimizer.step_ahead():`",
                self._names[parameter],
            )

    def enter(self, module: Module) -> None:
        """Before a module's forward."""
        self._watch(module)
        if self._outer is not None:
            self._depth += module is self._outer
        elif not self._suspended and (holders := self._holders_in(module)):
            self._outer, self._depth = module, 1
            if isinstance(module, ParametrizationList):
                return
            self._trains = _is_training(module, holders) and _differentiates(holders)
            was_ahead = self._moved.is_ahead
            self._resumes = was_ahead and not self._trains
            if self._trains:
                self._forth()
            else:
                self._back()
            if self._moved.is_ahead is not was_ahead and not _in_backward():
                gather_anew(module)

    def leave(self, module: Module, output: Any) -> None:
        """After a module's forward, or when it has failed."""
        if module is not self._outer:
            return
        self._depth -= 1
        if self._depth:
            return
        self._outer = None
        if isinstance(module, ParametrizationList):
            return
        if self._resumes:
            self._forth()
        if torch.is_grad_enabled() and not _in_backward():
            begins = self._differentiate if self._trains else self._refuse
            made = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
            for tensor in made:
                if tensor.grad_fn is not None:
                    tensor.register_hook(begins)

    def _differentiate(self, gradient: Tensor) -> None:
        """A backward has come to what was computed ahead."""
        self._stays |= torch.is_grad_enabled()
        self._forth()
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._differentiated)

    def _differentiated(self) -> None:
        if not self._stays:
            self._back()

    def _refuse(self, gradient: Tensor) -> None:
        """A backward has come to what was computed at x."""
        if self._moved.is_ahead:
            raise RuntimeError(
                "hvd_sketch: a loss is differentiated through a forward in evaluation mode while another of the same "
                "model, in training mode, is under way, whose parameters are stepped ahead: let all forwards of a "
                "step be of one mode, or pass error_feedback=None"
            )

    def _forth(self) -> None:
        if self._moved.is_ahead or not self._moves():
            return
        with _moving():
            self._moved.forth()
        self._versions = [parameter._version for parameter in self._names]
        for holder in {holder for holders in self._holders.values() for holder in holders}:
            self._guards.callback(holder.register_state_dict_pre_hook(self._look).remove)
            self._guards.callback(holder.register_load_state_dict_pre_hook(self._look).remove)

    def _look(self, *arguments: Any) -> None:
        """Somebody saves the model or loads another."""
        self._back()

    def _back(self) -> None:
        if not self._moved.is_ahead:
            return
        self._guards.close()
        now = [parameter._version for parameter in self._names]
        with _moving():
            self._moved.back()
        for name, then, version in zip(self._names.values(), self._versions, now, strict=True):
            if then != version:
                self._keep_out(name)
                break

    def _keep_out(self, name: str) -> None:
        self._suspended = True
        _log.warning(
            "hvd_sketch: parameter %r was changed between a forward and its backward, where parameters are stepped "
            "ahead; that change was taken back, and from now on gradients are computed without the step ahead",
            name,
        )

    def _holders_in(self, module: Module) -> list[Module]:
        """The modules in this one that hold parameters of ours themselves."""
        found = self._holders.get(module)
        if found is None:
            parts = module.modules()
            found = [part for part in parts if any(p in self._names for p in part.parameters(recurse=False))]
            self._holders[module] = found
        return found


def _nothing(module: Module) -> None:
    return


_live: list[weakref.ref[Passes]] = []
_installed: list[Any] = []


def _follow(passes: Passes) -> None:
    """Let it see the forwards of all modules, as long as it lives."""
    _live.append(weakref.ref(passes, _live.remove))
    if not _installed:
        # a compiled module fires them beside its own modules, whose hooks are traced away: `_enter` knows
        warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)` when there are global hooks")
        _installed.append(register_module_forward_pre_hook(_enter))
        _installed.append(register_module_forward_hook(_leave, always_call=True))


def _alive() -> list[Passes]:
    """Of all threads; others may begin meanwhile."""
    return [passes for passes in [reference() for reference in list(_live)] if passes is not None]


def _is_traced() -> bool:
    """Whether a graph is made of what is computed, which moves of parameters do not belong to."""
    return torch.compiler.is_dynamo_compiling() or torch._C._get_tracing_state() is not None


def _enter(module: Module, arguments: Any) -> None:
    if not _is_traced():
        for passes in _alive():
            passes.enter(module)


def _leave(module: Module, arguments: Any, output: Any) -> None:
    if not _is_traced():
        for passes in _alive():
            passes.leave(module, output)


@contextmanager
def _moving() -> Iterator[None]:
    """Whatever mode the script is in; autocast must not go on with what it has cast before."""
    with torch.inference_mode(False), torch.no_grad():
        yield
    torch.clear_autocast_cache()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() >= 0


def _is_training(module: Module, holders: Iterable[Module]) -> bool:
    """Lightning puts a wrapper into evaluation mode with the model, and back the model alone."""
    return module.training or any(holder.training for holder in holders)


def _differentiates(holders: Iterable[Module]) -> bool:
    """Whether gradients of these are taken of what is computed now; of a scripted one saving is not noticed."""
    if not torch.is_grad_enabled():
        return _in_checkpoint()
    return not any(isinstance(holder, torch.jit.ScriptModule) for holder in holders)


def _in_checkpoint() -> bool:
    """Whether the caller is a segment of reentrant activation checkpointing, whose forward is computed again."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False
