"""Our optimizer in the place of Horovod's, for scripts that know nothing of us, and for the workers they start."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from hvd_sketch.comm import has_horovod
from hvd_sketch.compressors import Compression, Compressor
from hvd_sketch.errors import ConfigurationError
from hvd_sketch.frontends.join import join
from hvd_sketch.frontends.optimizer import DistributedOptimizer
from hvd_sketch.frontends.or_dense import OrDense

_RANK_VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
_logger = logging.getLogger("hvd_sketch")


class Substitute:
    """What scripts find as ``DistributedOptimizer``.

    A script that chooses ``none`` or ``fp16`` gets the given compression instead; one that brings a compressor of
    its own keeps it. Where it is loaded from a pickle, it takes Horovod's place as well.

    Attributes:
        stock: Horovod's.
        used: whether an optimizer was wrapped, here or in workers.
    """

    def __init__(self, compression: Any, stock: Callable[..., Any]) -> None:
        functools.update_wrapper(self, stock)  # Horovod looks for its module's name
        self.stock, self.used = stock, False
        self._compression = compression

    def __call__(self, optimizer: Any, named_parameters: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As Horovod's."""
        import horovod.torch as hvd

        self.used = True
        own = args[0] if args else kwargs.pop("compression", hvd.Compression.none)
        plain = (hvd.Compression.none, hvd.Compression.fp16, Compression.none, Compression.fp16)
        chosen = self._compression if own in plain else own
        if isinstance(chosen, Compressor) and own in plain:
            chosen = OrDense(wanted=chosen)
        return DistributedOptimizer(optimizer, named_parameters, chosen, *args[1:], **kwargs)

    def __reduce__(self) -> Any:
        return substitute, (self._compression,)

    def tell_if_unused(self) -> None:
        """Tell, on one rank, if nothing was compressed."""
        rank = next((os.environ[name] for name in _RANK_VARIABLES if name in os.environ), "0")
        if not self.used and rank == "0":
            sys.stdout.flush()
            _logger.warning(
                "hvd_sketch: nothing was compressed: the script wrapped no optimizer in "
                "horovod.torch.DistributedOptimizer"
            )


@dataclass
class _Worker:
    """A script's function on its way to workers of ``horovod.run``."""

    compression: Any
    function: Callable[..., Any]

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        ours = substitute(self.compression)
        result = self.function(*arguments, **keywords)
        ours.tell_if_unused()
        return result


def substitute(compression: Any) -> Substitute:
    """Make Horovod's ``DistributedOptimizer`` ours, with this compression, by whatever name it is known here.

    ``horovod.run`` then does the same in the workers that it starts, and ``hvd.join`` is ours as well.
    Horovod's files stay as they are.

    Raises:
        ConfigurationError: when Horovod is not installed.
    """
    if not has_horovod():
        raise ConfigurationError("scripts are run unmodified only where Horovod is installed; see the README")
    import horovod
    import horovod.torch as hvd
    from horovod.torch import mpi_ops

    if isinstance(hvd.DistributedOptimizer, Substitute):
        return hvd.DistributedOptimizer
    ours = Substitute(compression, hvd.DistributedOptimizer)
    start = horovod.run

    @functools.wraps(start)
    def run(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        ours.used = True
        return start(_Worker(compression, func), *args, **kwargs)

    _replace(ours.stock, ours)
    _replace(start, run)
    _replace(hvd.join, join, keep=mpi_ops)
    return ours


def _replace(stock: Any, ours: Any, keep: ModuleType | None = None) -> None:
    """Wherever a module has one, put the other."""
    for module in [module for module in list(sys.modules.values()) if isinstance(module, ModuleType)]:
        for name in [name for name, value in list(vars(module).items()) if value is stock]:
            if module is not keep:
                setattr(module, name, ours)
