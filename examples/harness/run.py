"""One training run: it counts the steps, shows the progress, evaluates, records and saves."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

import hvd_sketch as hvd
from harness import checkpoint
from harness.options import label_of
from harness.record import Record

_OF_THE_METHOD = ("compression", "ratio", "warmup_steps", "anticipate")
_FILES = ("save", "resume", "results", "baseline", "plot")


class Run:
    """Drives a loop ``for step in run.steps()``; what it measured is in ``record``.

    Args:
        options: of `harness.parser`.
        model, optimizer: the optimizer as ``hvd.DistributedOptimizer`` returned it.
        evaluate: called on all ranks between steps; the same number on all of them.
        metric: what that number is.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        model: torch.nn.Module,
        optimizer: Any,
        evaluate: Callable[[], float],
        metric: str,
    ) -> None:
        self._options, self._model, self._optimizer, self._evaluate = options, model, optimizer, evaluate
        self._meter = _meter(optimizer, options.compression)
        self.record = Record(label_of(options), metric, settings_of(options))
        self._first_step = 0
        if options.resume is not None:
            self._first_step, record = checkpoint.load(options.resume, model, optimizer)
            self.record = Record(**{**record, "label": label_of(options), "settings": settings_of(options)})

    def steps(self) -> Iterator[int]:
        """The steps that are left to do; each ends when the loop asks for the next one."""
        options, earlier = self._options, asdict(self.record)
        elapsed = 0.0
        progress = tqdm(
            range(self._first_step, options.steps),
            desc=self.record.label,
            initial=self._first_step,
            total=options.steps,
            unit="step",
            disable=hvd.rank() != 0,
        )
        for step in progress:
            start = time.perf_counter()
            yield step
            elapsed += time.perf_counter() - start
            if (step + 1) % options.eval_every == 0 or step + 1 == options.steps:
                self._note(step + 1, elapsed, earlier)
                progress.set_postfix_str(f"{self.record.metric} {self.record.values[-1]:.3f}")
                if options.save is not None:
                    checkpoint.save(options.save, step + 1, self._model, self._optimizer, asdict(self.record))

    def _note(self, steps_done: int, elapsed: float, earlier: dict[str, Any]) -> None:
        sent, dense, seconds = self._meter(steps_done - self._first_step)
        seconds["compute"] = elapsed - sum(seconds.values())
        record = self.record
        record.steps.append(steps_done)
        record.values.append(self._evaluate())
        record.bytes.append(sent + (earlier["bytes"] or [0])[-1])
        record.dense_bytes = dense + earlier["dense_bytes"]
        record.seconds = {phase: spent + earlier["seconds"].get(phase, 0.0) for phase, spent in seconds.items()}


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What two runs must have in common to be compared."""
    settings = {name: value for name, value in vars(options).items() if name not in (*_OF_THE_METHOD, *_FILES)}
    return {"ranks": hvd.size(), **settings}


def mean_over_ranks(total: float, count: int) -> float:
    """The mean of what all ranks counted together, each with its sum and its number of items."""
    sums = hvd.allreduce(torch.tensor([total, count], dtype=torch.float64), name="evaluation")
    return float(sums[0] / sums[1])


Meter = Callable[[int], tuple[int, int, dict[str, float]]]
"""Maps the steps done to bytes sent by this rank, bytes of a dense exchange, and seconds by phase."""


def _meter(optimizer: Any, compression: str) -> Meter:
    if hasattr(optimizer, "exchange"):
        return lambda steps: _counted(optimizer.exchange.stats)
    return _horovods_own(optimizer, bytes_per_value=2 if compression == "fp16" else 4)


def _counted(stats: hvd.Stats) -> tuple[int, int, dict[str, float]]:
    return stats.bytes_sent, stats.dense_bytes, dict(stats.seconds)


def _horovods_own(optimizer: Any, bytes_per_value: int) -> Meter:
    """Horovod counts no bytes: the ring's formula does, and a clock around what `step` waits for."""
    values = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    sent = 2 * (hvd.size() - 1) * values // hvd.size()
    waited, synchronize = {"exchange": 0.0}, optimizer.synchronize

    def timed_synchronize() -> None:
        start = time.perf_counter()
        synchronize()
        waited["exchange"] += time.perf_counter() - start

    optimizer.synchronize = timed_synchronize
    return lambda steps: (steps * bytes_per_value * sent, steps * 4 * sent, dict(waited))
