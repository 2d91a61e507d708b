"""What every rank runs for one row of the table: some timed steps of one method on one model.

``python -m benchmarks.cluster.worker --model cnn-10M --method sketch-40 --seconds 20 --out row.json``
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.cluster.methods import METHODS
from benchmarks.cluster.models import MODELS, Batch, Model
from benchmarks.cluster.trainings import Training, sgd, train

_FEWEST, _MOST = 3, 60
_LOCAL_STEPS, _LOCAL_ROUNDS = 8, 3
_LINK = Path("/sys/class/net/eth0/statistics")
_SESSION = Path("/proc/self/autogroup")  # the kernel shares processors between sessions first, where it is there
_HEADERS = 14 + 20 + 32  # bytes of a packet: Ethernet, IP, TCP with time stamps


def main() -> None:
    """Train, and let rank 0 write the row's measurements."""
    options = _options()
    torch.manual_seed(0)
    model = MODELS[options.model]()
    method = METHODS[options.method]
    training = method.start()
    come_first()
    batch = model.batch(torch.Generator().manual_seed(training.rank))
    compute = _together(training, _local_step(model, batch)) - _together(training, lambda: None)
    training.attach(model, sgd(model))
    for _ in range(method.warmup):
        begin = time.perf_counter()
        training.step(*batch)
        last = time.perf_counter() - begin
    steps = max(_FEWEST, min(_MOST, int(options.seconds / training.gather(last)[0])))
    row = {"seconds_compute": compute, "runs": steps, "kernel": training.kernel, **_measure(training, batch, steps)}
    if len(set(training.gather(_checksum(model)))) > 1:
        raise RuntimeError("the ranks ended with different parameters")
    if training.rank == 0:
        options.out.write_text(json.dumps(row))


def _measure(training: Training, batch: Batch, steps: int) -> dict[str, Any]:
    """Times and bytes of so many steps; times are those of the slowest rank, bytes the mean over the ranks."""
    training.gather(None)
    phases, own, sent, processor = training.phases(), training.bytes_sent(), _sent(), time.process_time()
    seconds: list[float] = []
    for _ in range(steps):
        begin = time.perf_counter()
        training.step(*batch)
        seconds.append(time.perf_counter() - begin)
    processor = time.process_time() - processor
    training.gather(None)
    mine: dict[str, Any] = {
        "bytes_per_rank": (training.bytes_sent() - own) / steps,
        "counter_bytes_per_rank": (_sent()[1] - sent[1]) / steps,
        "frame_bytes_per_rank": (_sent()[0] - sent[0]) / steps,
        "seconds_processor": processor / steps,
    }
    spent = {name: (value - phases.get(name, 0.0)) / steps for name, value in training.phases().items()}
    ranks = training.gather((seconds, mine, spent))
    return {
        "seconds_step": statistics.median(map(max, zip(*(seconds for seconds, _, _ in ranks), strict=True))),
        "phases": {name: statistics.median(spent[name] for _, _, spent in ranks) for name in spent},
        **{name: statistics.fmean(mine[name] for _, mine, _ in ranks) for name in mine},
    }


def _local_step(model: Model, batch: Batch) -> Callable[[], None]:
    """A step without any exchange, at a learning rate that leaves the model as it is."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return lambda: train(model, optimizer, *batch)


def _together(training: Training, step: Callable[[], None]) -> float:
    """Seconds of a step, from the first one's start to the moment when all ranks have done some in a row.

    Hosts share the processors, so the last one's end counts: the first ones may have had them for themselves. In a
    row, because that all are through is only known at the end of a cycle of Horovod's.
    """
    step()
    training.gather(None)
    seconds: list[float] = []
    for _ in range(_LOCAL_ROUNDS):
        begin = time.perf_counter()
        for _ in range(_LOCAL_STEPS):
            step()
        training.gather(None)
        seconds.append((time.perf_counter() - begin) / _LOCAL_STEPS)
    return statistics.median(seconds)


def come_first() -> None:
    """Let no other program of the machine delay this process: on a real host it would have processors of its own.

    The threads that communicate come before those that compute, or one host's arithmetic would keep another host's
    messages waiting; those that compute share the processors evenly. Threads made later inherit the priority.
    """
    for thread in map(int, os.listdir("/proc/self/task")):
        if thread != os.getpid():
            os.sched_setscheduler(thread, os.SCHED_RR, os.sched_param(1))
    os.setpriority(os.PRIO_PROCESS, 0, -20)
    if _SESSION.exists():
        _SESSION.write_text("-20")


def _sent() -> tuple[int, int]:
    """Bytes that left through this host's link so far: with all headers, and without."""
    total, packets = (int((_LINK / name).read_text()) for name in ("tx_bytes", "tx_packets"))
    return total, total - _HEADERS * packets


def _checksum(model: nn.Module) -> int:
    checksum = 0
    for parameter in model.parameters():
        checksum = zlib.crc32(parameter.detach().numpy().reshape(-1).view("uint8").data, checksum)
    return checksum


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=tuple(MODELS), required=True)
    parser.add_argument("--method", choices=tuple(METHODS), required=True)
    parser.add_argument("--seconds", type=float, default=10.0, help="aim at so many seconds of timed steps")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
