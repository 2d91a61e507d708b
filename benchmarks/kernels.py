"""``python -m benchmarks.kernels``: the kernels of the sketch against one copy of the vector, in the same run.

Writes ``docs/benchmarks/kernels.md`` and ``benchmarks/results/kernels.json``, a row for each measurement: what was
done (``op``) by what (``impl``) on which ``device``, the size of the vector ``d`` and of the table (``rows``,
``cols``), the choice ``k``, ``threads``, and the medians of its ``seconds`` and of ``clone_seconds``, those of
``torch.Tensor.clone`` of the same vector, which takes its turn after each of the others. All float32.

- ``add``: sketch the vector; ``add_slices``: the same vector as 100 slices in one call, ``add_each``: in 100;
- ``top_k``: choose k coordinates from the table, and ``estimate``: estimate all of them;
- ``stage``: copy a gradient to its place and take its norm; by ``torch`` in two passes;
- ``mix``: transform the vector, as a matrix of 1024 columns, by ``hadamard`` and by ``dct``; see `hvd_sketch.mixing`;
- ``advance``: add a gradient to the memory, set what was sent, a hundredth, and sketch the result; by ``passes`` one
  after the other, of which the last is ``add``;
- by ``index_add``: a classic Count Sketch in PyTorch, with buckets and signs looked up, not hashed;
- by ``topk``: ``torch.topk`` of the vector itself, of which no sketch was taken;
- by ``triton``: on the GPU, where there is one, timed by its events; ``threads`` is 0.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels_page import write
from hvd_sketch.exchange.staging import Staging
from hvd_sketch.layout import Layout, Slot
from hvd_sketch.mixing import Mixing
from hvd_sketch.sketch import CountSketch, native
from hvd_sketch.sparse.chosen import Chosen

RESULTS = Path(__file__).resolve().parent / "results" / "kernels.json"
SLICES = 100
LARGEST_CLASSIC = 25_000_000
"""Coordinates; the table of a classic sketch's buckets takes 8 bytes for each and row."""

Row = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e6, 25e6, 100e6], help="coordinates of a vector")
    parser.add_argument("--rows", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--columns", type=float, nargs="+", default=[0.01, 0.1], help="as a share of the coordinates")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--seconds", type=float, default=2.0, help="about how long each measurement takes")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="only write the page again, from the rows in --out")
    options = parser.parse_args(arguments)
    if options.report:
        write(json.loads(options.out.read_text()))
        return 0
    if not native.available():
        return 1
    rows = []
    for row in chain(measure(options), measure_gpu(options)):
        print(_line(row), flush=True)
        rows.append(row)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    if options.out == RESULTS:
        write(rows)
    return 0


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """All rows, one after the other."""
    for d in map(int, options.sizes):
        vector = torch.randn(d, generator=torch.Generator().manual_seed(0))
        choices = (max(1, d // 1000), max(1, d // 100))
        for threads in dict.fromkeys(options.threads):
            torch.set_num_threads(threads)
            for k in choices:
                row = {"op": "top_k", "impl": "topk", "d": d, "k": k, "threads": threads}
                yield _time(row, partial(_topk, vector, k), vector, options.seconds)
            for impl, function in _stage(vector):
                yield _time(
                    {"op": "stage", "impl": impl, "d": d, "threads": threads}, function, vector, options.seconds
                )
            for impl in ("hadamard", "dct"):
                matrix, function = _mix(vector, impl)
                row = {"op": "mix", "impl": impl, "d": matrix.numel(), "threads": threads}
                yield _time(row, function, matrix, options.seconds)
            for rows in options.rows:
                for share in options.columns:
                    shape = {"d": d, "rows": rows, "cols": int(d * share), "threads": threads}
                    for row, function in _native(shape, vector, choices):
                        yield _time(row, function, vector, options.seconds)
                    if d <= LARGEST_CLASSIC:
                        row = {"op": "add", "impl": "index_add", **shape}
                        yield _time(row, _classic(shape, vector), vector, options.seconds)


def measure_gpu(options: argparse.Namespace) -> Iterator[Row]:
    """The rows of the GPU; none without one, or without Triton."""
    if not torch.cuda.is_available() or find_spec("triton") is None:
        return
    for d in map(int, options.sizes):
        vector = torch.randn(d, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
        for rows in options.rows:
            for share in options.columns:
                sketch = CountSketch(d, rows, int(d * share), seed=1, device="cuda")
                shape = {"impl": "triton", "device": f"cuda: {torch.cuda.get_device_name()}", "d": d, "rows": rows}
                shape |= {"cols": int(d * share)}
                add = partial(sketch.add, vector)
                yield _time({"op": "add", **shape}, add, vector, options.seconds, _once_on_gpu)
                for k in (max(1, d // 1000), max(1, d // 100)):
                    top_k = partial(sketch.top_k, k)
                    yield _time({"op": "top_k", "k": k, **shape}, top_k, vector, options.seconds, _once_on_gpu)


def _native(shape: Row, vector: Tensor, choices: Sequence[int]) -> Iterator[tuple[Row, Callable[[], object]]]:
    sketch = CountSketch(shape["d"], shape["rows"], shape["cols"], seed=1)
    slices = list(vector.tensor_split(SLICES))
    offsets = [int(part.storage_offset()) for part in slices]

    def add_each() -> None:
        for part, offset in zip(slices, offsets, strict=True):
            sketch.add(part, offset)

    yield {"op": "add", "impl": "native", **shape}, lambda: sketch.add(vector)
    yield {"op": "add_slices", "impl": "native", **shape}, lambda: sketch.add_many(slices, offsets)
    yield {"op": "add_each", "impl": "native", **shape}, add_each
    # What was added many times is a multiple of the vector: the same choice.
    for k in choices:
        yield {"op": "top_k", "impl": "native", "k": k, **shape}, partial(sketch.top_k, k)
    yield {"op": "estimate", "impl": "native", **shape}, sketch.estimate
    for impl, function in _advance(sketch, vector, max(choices)):
        yield {"op": "advance", "impl": impl, **shape}, function


def _stage(vector: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    staging = Staging(Layout((Slot("", tuple(vector.shape), 0, vector.numel()),), 0, vector.numel()), vector.device)

    def native() -> float:
        staging.put(0, vector, 1.0, None, 0.0)
        return staging.norm()

    yield "native", native
    yield "torch", lambda: float(torch.linalg.vector_norm(staging.vector.copy_(vector)))


def _mix(vector: Tensor, kind: str) -> tuple[Tensor, Callable[[], object]]:
    """What of the vector fills blocks of 64 rows."""
    rows = vector.numel() // (64 * 1024) * 64
    matrix = vector[: rows * 1024].clone()
    slot = Slot("", (rows, 1024), 0, matrix.numel())
    return matrix, partial(Mixing(Layout((slot,), matrix.numel(), matrix.numel()), kind).mix, matrix, 0)


def _advance(sketch: CountSketch, vector: Tensor, k: int) -> Iterator[tuple[str, Callable[[], object]]]:
    memory, kept = torch.zeros_like(vector), torch.zeros(k)
    chosen = Chosen(sketch.top_k(k)[0], slice(0))

    def passes() -> None:
        memory.add_(vector, alpha=0.5)
        chosen.put(memory, kept)
        sketch.add(memory)

    yield "native", lambda: sketch.add_advanced(memory, vector, 0.5, chosen, kept)
    yield "passes", passes


def _topk(vector: Tensor, k: int) -> object:
    return torch.topk(vector.abs(), k)


def _classic(shape: Row, vector: Tensor) -> Callable[[], object]:
    table = torch.zeros(shape["rows"], shape["cols"])
    buckets = torch.randint(shape["cols"], (shape["rows"], shape["d"]))
    signs = 2.0 * torch.randint(2, (shape["rows"], shape["d"]), dtype=torch.float32) - 1.0

    def add() -> None:
        for row, bucket, sign in zip(table, buckets, signs, strict=True):
            row.index_add_(0, bucket, sign * vector)

    return add


def _once(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _once_on_gpu(function: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def _time(
    row: Row,
    function: Callable[[], object],
    vector: Tensor,
    seconds: float,
    once: Callable[[Callable[[], object]], float] = _once,
) -> Row:
    """The row with its medians: warm, in turns with the copy, at least 5 of each."""
    once(function)  # the first call may compile
    first = once(function) + once(vector.clone)
    turns = [(once(function), once(vector.clone)) for _ in range(max(5, min(500, int(seconds / first))))]
    ours, clone = (statistics.median(column) for column in zip(*turns, strict=True))
    blank = {"op": "", "impl": "", "device": _device(), "d": 0, "rows": None, "cols": None, "k": None, "threads": 0}
    return blank | row | {"seconds": ours, "clone_seconds": clone, "runs": len(turns)}


def _device() -> str:
    """The processor's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"cpu: {names[0] if names else platform.processor()}, {len(names) or '?'} cores"


def _line(row: Row) -> str:
    shape = " ".join(f"{name}={row[name]}" for name in ("d", "rows", "cols", "k", "threads") if row[name] is not None)
    ratio = row["seconds"] / row["clone_seconds"]
    return f"{row['op']:>10} {row['impl']:9} {1e3 * row['seconds']:9.3f} ms = {ratio:6.2f} x clone  {shape}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
