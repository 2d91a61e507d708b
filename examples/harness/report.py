"""Train, with a baseline where one is asked for, and tell what came out: a table, a file, a picture."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import hvd_sketch as hvd
from harness.options import without_compression
from harness.record import Record, read_baseline, write
from harness.run import settings_of
from hvd_sketch.comm import chosen_backend

_BACKENDS = {"horovod": "Horovod", "torch": "torch.distributed", "mpi": "MPI (mpi4py)", "single": "no network"}
_COLOURS = ("#4d4d4d", "#d1495b", "#00798c", "#edae49")


def compare(train: Callable[[argparse.Namespace], Record], options: argparse.Namespace) -> None:
    """Run ``train(options)``, after the same without compression if ``--plot`` needs one; report on rank 0."""
    _share_cores()
    records = []
    if options.baseline is not None:
        records.append(read_baseline(options.baseline, settings_of(options)))
    elif options.plot is not None and options.compression != "none":
        records.append(train(without_compression(options)))
    records.append(train(options))
    if hvd.rank() != 0:
        return
    show(records)
    if options.results is not None:
        write(options.results, records)
    if options.plot is not None:
        plot(options.plot, records)
        print(f"curves: {options.plot}")


def show(records: Sequence[Record]) -> None:
    """Print the final table, one column a run, and the gap to the first one."""
    settings = records[0].settings
    title = f"{settings['ranks']} ranks over {_BACKENDS[chosen_backend()]}, learning rate {settings['lr']:g}"
    table = Table(title=title, title_style="", header_style="", box=box.SIMPLE_HEAD)
    table.add_column("")
    for record in records:
        table.add_column(record.label, justify="right")
    table.add_row("steps", *(f"{record.steps[-1]}" for record in records))
    table.add_row(records[0].metric, *(f"{record.values[-1]:.4f}" for record in records))
    table.add_row("MB sent per rank", *(f"{record.bytes[-1] / 1e6:.1f}" for record in records))
    table.add_row("ratio, warm-up included", *(f"{record.ratio:.1f}" for record in records), end_section=True)
    phases = dict.fromkeys(phase for record in records for phase in record.seconds)
    for phase in sorted(phases, key=lambda phase: phase == "compute"):
        table.add_row(f"seconds in {phase}", *(f"{record.seconds.get(phase, 0.0):.1f}" for record in records))
    Console().print(table)
    for record in records[1:]:
        print(f"{record.label}: {record.metric} {record.gap(records[0]):+.1f} % against {records[0].label}")


def plot(path: Path, records: Sequence[Record]) -> None:
    """Draw the metric over steps and over bytes, a curve for each run."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, (over_steps, over_bytes) = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for record, colour in zip(records, _COLOURS, strict=False):
        style = {"color": colour, "marker": "o", "markersize": 3, "linewidth": 1.6, "label": _legend(record)}
        over_steps.plot(record.steps, record.values, **style)
        over_bytes.plot([sent / 1e6 for sent in record.bytes], record.values, **style)
    over_steps.set(xlabel="steps", ylabel=records[0].metric, xlim=(0, None))
    over_bytes.set(xlabel="MB sent per rank", xscale="log")
    over_bytes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    over_bytes.xaxis.set_major_formatter("{x:g}")
    over_bytes.xaxis.set_minor_formatter(NullFormatter())
    over_bytes.legend(frameon=False)
    for axes in (over_steps, over_bytes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _legend(record: Record) -> str:
    return f"{record.label}: {record.values[-1]:.3f} after {record.bytes[-1] / 1e6:.0f} MB"


def _share_cores() -> None:
    """Give each rank of this host its part of the cores, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // hvd.local_size()))
