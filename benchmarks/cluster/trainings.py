"""What a rank of each method does: all train the same model on the same batches."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

LEARNING_RATE = 0.01
_NAP = 100e-6  # seconds between two looks at a collective, at least
_LATE = 0.02  # of the time waited so far, when that is longer
_FIRST_POWERSGD_STEP = 2  # the earliest that PyTorch allows


class Training(ABC):
    """One rank's part of a distributed training run; connects to the others when made.

    Attributes:
        rank, size: which of how many ranks this is.
        kernel: what computes the sketches, where there are any.
    """

    rank: int
    size: int
    kernel = ""
    optimizer: Any
    _model: nn.Module

    @abstractmethod
    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Make the model's steps with this optimizer exchange their gradients from now on."""

    @abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable value, by rank; also a barrier."""

    @abstractmethod
    def bytes_sent(self) -> float:
        """Bytes this rank has sent for gradients, by the method's own account."""

    def phases(self) -> dict[str, float]:
        """Seconds spent so far in each part of the exchange, where the method tells."""
        return {}

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """One training step, exchange included."""
        train(self._model, self.optimizer, inputs, targets)

    def _ring_bytes(self, message: float) -> float:
        """What one rank sends in an allreduce of so many bytes."""
        return 2 * (self.size - 1) / self.size * message


class Horovod(Training):
    """Horovod with one of its own compressors: ``none`` or ``fp16``."""

    def __init__(self, compression: str) -> None:
        import horovod.torch as hvd

        hvd.init()
        _wait_asleep()
        self.rank, self.size, self._name = hvd.rank(), hvd.size(), compression
        self._bytes = 0.0

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        import horovod.torch as hvd

        self._model = model
        compressor = getattr(hvd.Compression, self._name)
        self.optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compressor)
        self._step_bytes = self._ring_bytes((2 if self._name == "fp16" else 4) * _coordinates(model))

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        super().step(inputs, targets)
        self._bytes += self._step_bytes

    def gather(self, value: Any) -> list[Any]:
        import horovod.torch as hvd

        values: list[Any] = hvd.allgather_object(value, name="benchmark")
        return values

    def bytes_sent(self) -> float:
        return self._bytes


class Exchanged(Training):
    """A step of ours: one of our compressors, or none, at full strength from the first step."""

    _settings: dict[str, Any]
    _comm: Any = None
    _options: Mapping[str, Any] = {}

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        import hvd_sketch

        compressor = _compressor(**self._settings)
        distributed: Any = hvd_sketch.DistributedOptimizer(
            optimizer, model.named_parameters(), compressor, comm=self._comm, error_feedback=None, **self._options
        )
        self._model, self.optimizer, self._stats = model, distributed, distributed.exchange.stats

    def bytes_sent(self) -> float:
        return float(self._stats.bytes_sent)

    def phases(self) -> dict[str, float]:
        return dict(self._stats.seconds)


class Sparsified(Exchanged, Horovod):
    """Over Horovod, with one of our compressors at a ratio and other settings."""

    def __init__(self, compression: str, ratio: float, **settings: Any) -> None:
        super().__init__(compression)
        self._step_bytes = 0.0
        self._settings = {"name": compression, "ratio": ratio, **settings}
        self.kernel = _kernel(compression)


class Mpi(Exchanged):
    """Over mpi4py, without Horovod: dense, or with one of our compressors; ``flat`` with a memory for every rank."""

    def __init__(self, compression: str = "none", *, flat: bool = False, **settings: Any) -> None:
        from mpi4py import MPI

        self._comm = MPI.COMM_WORLD
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()
        self._settings, self._options = {"name": compression, **settings}, {"hierarchical": False} if flat else {}
        self.kernel = _kernel(compression)

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = self._comm.allgather(value)
        return values


class Ddp(Training):
    """PyTorch's DistributedDataParallel over Gloo, plain or with its PowerSGD hook of some rank.

    The hook gets all gradients in one bucket: with several, its collectives come in a different order on each rank
    over Gloo, and the run ends with "Received data size doesn't match expected size".
    """

    def __init__(self, powersgd_rank: int | None = None) -> None:
        from torch import distributed

        distributed.init_process_group("gloo")
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self._powersgd_rank = powersgd_rank
        self._state: Any = None
        self._steps = 0

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
        from torch.nn.parallel import DistributedDataParallel

        self.optimizer = optimizer
        bucket = None if self._powersgd_rank is None else 4 * _coordinates(model) // 2**20 + 1
        self._model = wrapped = DistributedDataParallel(model, init_sync=False, bucket_cap_mb=bucket)
        self._step_bytes = self._ring_bytes(4 * _coordinates(model))
        if self._powersgd_rank is not None:
            self._state = powerSGD_hook.PowerSGDState(
                None, matrix_approximation_rank=self._powersgd_rank, start_powerSGD_iter=_FIRST_POWERSGD_STEP
            )
            wrapped.register_comm_hook(self._state, powerSGD_hook.powerSGD_hook)

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        super().step(inputs, targets)
        self._steps += 1

    def gather(self, value: Any) -> list[Any]:
        from torch import distributed

        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def bytes_sent(self) -> float:
        if self._state is None:
            return self._steps * self._step_bytes
        dense_steps = min(self._steps, _FIRST_POWERSGD_STEP)
        return dense_steps * self._step_bytes + self._ring_bytes(4 * self._state.total_numel_after_compression)


class DdpHooked(Ddp):
    """DistributedDataParallel with one of our compressors, or with PyTorch's own hook of half precision.

    That of bf16 refuses Gloo: it needs NCCL.
    """

    def __init__(self, compression: str, **settings: Any) -> None:
        super().__init__()
        self._name, self._settings = compression, settings

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
        from torch.nn.parallel import DistributedDataParallel

        import hvd_sketch

        self.optimizer = optimizer
        self._model = wrapped = DistributedDataParallel(model, init_sync=False)
        self._step_bytes = self._ring_bytes(2 * _coordinates(model))
        if self._name == "fp16":
            wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
            return
        compressor = _compressor(self._name, **self._settings)
        self._state = hvd_sketch.ddp.register(wrapped, optimizer, compressor, error_feedback=None)

    def bytes_sent(self) -> float:
        return self._steps * self._step_bytes if self._state is None else float(self._state.exchange.stats.bytes_sent)

    def phases(self) -> dict[str, float]:
        return {} if self._state is None else dict(self._state.exchange.stats.seconds)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor) -> None:
    """Forward, backward and optimizer step on one batch."""
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), targets).backward()
    optimizer.step()


def _compressor(name: str, **settings: Any) -> Any:
    import hvd_sketch

    if name == "none":
        return hvd_sketch.Compression.none
    return getattr(hvd_sketch.Compression, name)(warmup_steps=0, **settings)


def _kernel(compression: str) -> str:
    from hvd_sketch.sketch import native

    if compression != "sketch":
        return ""
    return "native" if native.available() else "reference"


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """What the rows of the table train with."""
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)


def _coordinates(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _wait_asleep() -> None:
    """Let Horovod's wait for a collective leave the processor to others.

    It spins. On a host of its own that takes nothing from anybody; here it would take the processor from other hosts.
    """
    from horovod.torch import mpi_ops

    library, finish = mpi_ops.mpi_lib, mpi_ops.mpi_lib.horovod_torch_wait_and_clear

    def wait_and_clear(handle: int) -> None:
        begin = time.perf_counter()
        while not mpi_ops.poll(handle):
            time.sleep(max(_NAP, _LATE * (time.perf_counter() - begin)))
        finish(handle)

    library.horovod_torch_wait_and_clear = wait_and_clear
