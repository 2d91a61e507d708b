"""What every compressor of ours is: settings that build an exchange."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hvd_sketch import stock
from hvd_sketch.comm.base import Communicator
from hvd_sketch.comm.hosts import Hosts
from hvd_sketch.errors import ConfigurationError, NothingGainedError
from hvd_sketch.exchange import Exchange, HierarchicalExchange, Setting
from hvd_sketch.exchange.decay import Decay
from hvd_sketch.exchange.tensor_scales import TensorScales
from hvd_sketch.layout import DensePredicate, Layout, small_or_named
from hvd_sketch.memory import Momentum
from hvd_sketch.mixing import check_mixing
from hvd_sketch.schedules.base import AdaptiveSchedule, Schedule, sampled, warmup
from hvd_sketch.settings import check_numbers

_MOST_FITTED = 32
"""Plans that a compressor keeps: those of all ranks in one process, of the parts of a host, of a few ratios."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Compressor(ABC):
    """Settings that build an `Exchange`; also a compressor for *stock* Horovod.

    Under ``horovod.torch.DistributedOptimizer`` the whole exchange runs when the first gradient
    of a step is decompressed, see `hvd_sketch.stock`; under `hvd_sketch.DistributedOptimizer`
    it is built directly.

    Attributes:
        clip_norm: each rank's gradient is scaled down to this L2 norm before it enters the
            memory; None to leave it. An unclipped spike stays in the memory for many steps.
        momentum: momentum correction, for an inner optimizer that has none.
        dense_below: tensors of fewer elements, and all 1-D ones, are sent whole; 0 to compress all. None for 0 where
            gradients are anticipated, and 1024 elsewhere.
        exclude: shell-style patterns of parameter names that are sent whole as well.
        anticipate: whether gradients are taken where the unsent ones will have taken the model, as
            `hvd_sketch.Anticipate` does, unless ``error_feedback`` is given. None for yes where that is possible: for
            SGD, Adam and AdamW, op=Average, without momentum correction. True to insist.
        mixing: "dct" or "hadamard" to choose and keep coefficients of an orthonormal transform of every tensor
            instead of its entries, see `hvd_sketch.mixing.Mixing`; None for the entries.
    """

    clip_norm: float | None = 1.0
    momentum: Momentum | None = None
    dense_below: int | None = None
    exclude: tuple[str, ...] = ()
    anticipate: bool | None = None
    mixing: str | None = None

    def __post_init__(self) -> None:
        check_numbers(self)
        check_mixing(self.mixing)
        stock.prepare()
        if self.clip_norm is not None and not self.clip_norm > 0.0:
            raise ConfigurationError(f"clip_norm must be above 0 or None, got {self.clip_norm}")
        if not isinstance(self.exclude, tuple):
            raise ConfigurationError(f"exclude must be a tuple of patterns, got {self.exclude!r}")

    def __str__(self) -> str:
        """The class, and the settings that are not its defaults."""
        settings = {entry.name: (getattr(self, entry.name), entry.default) for entry in fields(self) if entry.repr}
        del settings["anticipate"]  # the error feedback is told by itself
        own = [f"{name}={value!r}" for name, (value, default) in settings.items() if value != default]
        return f"{type(self).__name__}({', '.join(own)})"

    def is_dense(self, name: str, parameter: Tensor) -> bool:
        """Whether a parameter is sent whole in every step."""
        return small_or_named(self._smallest, self.exclude)(name, parameter)

    @property
    def wants_anticipation(self) -> bool:
        """Whether gradients are to be anticipated where that is possible."""
        return self.anticipate is not False

    @property
    def divides(self) -> bool:
        """Whether the ranks of a host can divide its exchange; not where it has to see tensors whole."""
        return self.mixing is None

    @property
    def _smallest(self) -> int:
        """The size of the smallest tensor that is compressed."""
        if self.dense_below is None:
            return 0 if self.anticipate else 1024
        return self.dense_below

    @property
    def wants_whole_tensors(self) -> bool:
        """Whether ranks of a host that divide its exchange do so between tensors, rather than every tensor."""
        return False

    def layout(self, named_parameters: Iterable[tuple[str, Tensor]], is_dense: DensePredicate | None = None) -> Layout:
        """Which coordinates of these parameters are compressed and which are sent whole.

        Args:
            named_parameters: or stand-ins for parts of them.
            is_dense: decides in place of the compressor's own rule.

        Raises:
            ConfigurationError: when the parameters are unfit, or none is left to compress.
        """
        layout = Layout.of(named_parameters, is_dense or self.is_dense, self.parts())
        if layout.compressed == 0:
            raise NothingGainedError(
                f"nothing to compress: all {layout.total} parameters are 1-D, smaller than "
                f"dense_below={self._smallest} or excluded; lower dense_below or use Compression.none"
            )
        return layout

    def exchange(
        self,
        layout: Layout,
        comm: Communicator,
        *,
        average: bool,
        device: torch.device,
        momentum: Momentum | None = None,
        hosts: Hosts | None = None,
    ) -> Exchange:
        """The exchange of one optimizer.

        Args:
            layout: of its parameters.
            comm: the ranks.
            average: mean over the ranks, or sum.
            device: where gradients and memory live.
            momentum: in place of the compressor's own.
            hosts: the ranks' hosts, if each host is to have one memory; see `HierarchicalExchange`.
        """
        setting = Setting(
            layout=layout,
            comm=comm,
            device=device,
            plan=partial(self.plan, layout),
            name=repr(self),
            label=str(self),
            average=average,
            clip_norm=self.clip_norm,
            momentum=momentum or self.momentum,
            mixing=self.mixing,
        )
        exchange = self.build(setting) if hosts is None else HierarchicalExchange(setting, hosts, self)
        vain = [each for each in self.exclude if not any(fnmatchcase(slot.name, each) for slot in layout.slots)]
        exchange.log.notes += [f"exclude={pattern!r} matches no parameter" for pattern in vain]
        return exchange

    @abstractmethod
    def plan(self, layout: Layout, step: int, ranks: int) -> Any:
        """The sizes of a step's messages, which `Exchange.send` is given; None to send everything.

        Must be the same on all ranks.
        """

    @abstractmethod
    def build(self, setting: Setting) -> Exchange:
        """The exchange in a setting."""

    def parts(self) -> int:
        """Into how many parts the layout is cut; see `Layout.of`."""
        return 1

    def compress(self, tensor: Tensor) -> tuple[Tensor, stock.Ticket]:
        """Stock Horovod's first call: note the gradient, hand out a one-element token to reduce."""
        return stock.compress(self, tensor)

    def decompress(self, tensor: Tensor, ctx: stock.Ticket | None) -> Tensor:
        """Stock Horovod's second call: the first one of a step runs the exchange."""
        return stock.decompress(self, tensor, ctx)


@dataclass(frozen=True, eq=False, kw_only=True)
class Sparsifier(Compressor):
    """What compressors share that send some coordinates now and the others later.

    Attributes:
        ratio: bytes a dense float32 exchange sends over the bytes this one sends, at least 1, where
            everything is sent.
        warmup_steps: the ratio grows from 1 to ``ratio`` in four stages over so many steps; 0 for ``ratio`` at once.
        schedule: the ratio of each step, in place of ``ratio`` and ``warmup_steps``; must give
            the same numbers on all ranks.
        tensor_power: p of `hvd_sketch.exchange.tensor_scales.TensorScales`, 0 to 1: what is sent is chosen by its
            size over the p-th power of its tensor's. 0 for its own size.
        decay: what is not sent is multiplied by it after every step, and so forgotten in the end; 1 to keep all.
    """

    ratio: float = 40.0
    warmup_steps: int = 0
    schedule: Schedule | None = field(default=None, repr=False)
    tensor_power: float = 0.0
    decay: float = 1.0
    _fitted: list[tuple[Layout, float, int, Any]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ratio >= 1.0:
            raise ConfigurationError(f"ratio must be at least 1, which sends everything; got {self.ratio}")
        if self.warmup_steps < 0:
            raise ConfigurationError(f"warmup_steps must be at least 0, got {self.warmup_steps}")
        if not 0.0 <= self.tensor_power <= 1.0:
            raise ConfigurationError(f"tensor_power must be from 0 to 1, got {self.tensor_power}")
        if not 0.0 < self.decay <= 1.0:
            raise ConfigurationError(f"decay must be above 0 and at most 1, got {self.decay}")

    @property
    def divides(self) -> bool:
        """Whether the ranks of a host can divide its exchange; not where it has to see tensors whole."""
        return super().divides and self.tensor_power == 0.0 and self.decay == 1.0

    def exchange(
        self,
        layout: Layout,
        comm: Communicator,
        *,
        average: bool,
        device: torch.device,
        momentum: Momentum | None = None,
        hosts: Hosts | None = None,
    ) -> Exchange:
        """As for every `Compressor`.

        A schedule that learns from the steps, see `AdaptiveSchedule`, is told of each of them.

        Raises:
            ConfigurationError: when the ratio cannot be reached; now, not at the end of the warm-up.
        """
        exchange = super().exchange(layout, comm, average=average, device=device, momentum=momentum, hosts=hosts)
        if self.schedule is None:
            exchange.plan_at(self.warmup_steps)
        if self.decay < 1.0:
            Decay(self.decay).attach(exchange)
        if self.tensor_power > 0.0:
            TensorScales(self.tensor_power).attach(exchange)
        if isinstance(self.schedule, AdaptiveSchedule):
            self.schedule.attach(exchange)
        elif self.schedule is not None:
            exchange.agree_on(sampled(self.schedule))
        if self.schedule is not None:
            kind = getattr(self.schedule, "__name__", type(self.schedule).__name__)
            exchange.log.notes.append(f"the ratio of a step is that of schedule={kind}")
        elif exchange.plan_at(0) is None:
            exchange.log.notes.append(f"the ratio is {self.ratio:g} from step {self.warmup_steps} on")
        return exchange

    def plan(self, layout: Layout, step: int, ranks: int) -> Any:
        """The sizes that the ratio of the step allows; None at ratio 1."""
        ratio = self.ratio_at(step)
        return None if ratio <= 1.0 else self._fit(layout, ratio, ranks)

    def _fit(self, layout: Layout, ratio: float, ranks: int) -> Any:
        """`fit`, or what it gave before: it takes a fraction of a millisecond, and most steps ask for the same."""
        for known, *key, plan in self._fitted:
            if known is layout and key == [ratio, ranks]:
                return plan
        plan = self.fit(layout, ratio, ranks)
        self._fitted[_MOST_FITTED - 1 :] = []
        self._fitted.insert(0, (layout, ratio, ranks, plan))
        return plan

    @abstractmethod
    def fit(self, layout: Layout, ratio: float, ranks: int) -> Any:
        """The largest messages that keep the bytes of a step ``ratio`` times below a dense exchange's.

        Raises:
            ConfigurationError: when there are none.
        """

    def ratio_at(self, step: int) -> float:
        """The compression ratio of a step; 1 means that everything is sent."""
        schedule = self.schedule or warmup(self.ratio, self.warmup_steps)
        ratio = schedule(step)
        if not ratio >= 1.0:
            raise ConfigurationError(f"schedule gave ratio {ratio} in step {step}; it must be at least 1")
        return ratio


@dataclass(frozen=True, eq=False, kw_only=True)
class Bucketed(Sparsifier):
    """A sparsifier whose exchange can be cut into parts.

    Attributes:
        buckets: parts of the vector, exchanged one behind the other: while one is on the wire, others are
            computed. Every part has its share of what is sent.
    """

    buckets: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.buckets < 1:
            raise ConfigurationError(f"buckets must be at least 1, got {self.buckets}")
