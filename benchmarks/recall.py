"""``python -m benchmarks.recall``: how many of the heaviest coordinates the sketch finds, beside a classic one.

Of each vector the k = d / 200 heaviest coordinates are known; found is the share of them among the 4 k with the
largest estimates, from a table of d / 50 columns. The classic sketch has independent random cells and signs, looked up
and not hashed. Both get the same vectors, and draws of their own for each.

Writes ``benchmarks/results/recall.json``, a row for each vector and number of rows, with the means over the draws
(``ours``, ``classic``), and the table in ``docs/design.md``.

- ``runs``: normal numbers, each run of so many times a log-normal scale (sigma = 2);
- ``hot runs``: normal numbers, 2 % of the runs (at least one) ten times as large;
- ``embedding``, ``perceptron``, ``convolution``: the gradient of one parameter after a few steps of training on the
  words of Python's standard library, or on scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.recall_gradients import GRADIENTS
from hvd_sketch.sketch import CountSketch

RESULTS = Path(__file__).resolve().parent / "results" / "recall.json"
PAGE = RESULTS.parents[2] / "docs" / "design.md"
BEGIN, END = "<!-- written by benchmarks.recall -->\n", "<!-- until here -->\n"
WIDTHS = (256, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
ROWS = (3, 5)

Row = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    """Measure and write; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recall", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--dim", type=float, default=2e6, help="coordinates of the vectors that are drawn")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="of the runs")
    parser.add_argument("--draws", type=int, default=10, help="how often vector, cells and signs are drawn")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="only write the table again, from the rows in --out")
    options = parser.parse_args(arguments)
    if options.report:
        write(json.loads(options.out.read_text()))
        return 0
    rows: list[Row] = []
    total = len(ROWS) * (2 * len(options.widths) + len(GRADIENTS))
    for row in tqdm(measure(int(options.dim), options.widths, options.draws), total=total, unit="row"):
        rows.append(row)
        options.out.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    if options.out == RESULTS:
        write(rows)
    return 0


def measure(dim: int, widths: Sequence[int], draws: int) -> Iterator[Row]:
    """All rows, one after the other."""
    for name, make in (("runs", runs), ("hot runs", hot_runs)):
        for width in widths:
            yield from _recall({"vector": name, "width": width}, partial(make, dim, width), draws)
    for name, gradient in GRADIENTS.items():
        vectors = [gradient(draw) for draw in range(draws)]
        yield from _recall({"vector": name, "width": None}, vectors.__getitem__, draws)


def runs(dim: int, width: int, seed: int) -> Tensor:
    """Normal numbers, each run of ``width`` on a log-normal scale."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn(-(-dim // width), generator=generator).mul_(2.0).exp_()
    return torch.randn(dim, generator=generator) * scale.repeat_interleave(width)[:dim]


def hot_runs(dim: int, width: int, seed: int) -> Tensor:
    """Normal numbers, 2 % of the runs of ``width`` ten times as large."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.ones(-(-dim // width))
    scale[torch.randperm(len(scale), generator=generator)[: max(1, len(scale) // 50)]] = 10.0
    return torch.randn(dim, generator=generator) * scale.repeat_interleave(width)[:dim]


def _recall(about: Row, make: Callable[[int], Tensor], draws: int) -> Iterator[Row]:
    for rows in ROWS:
        ours = classic = 0.0
        for draw in range(draws):
            vector = make(draw)
            k, cols = vector.numel() // 200, vector.numel() // 50
            heavy = torch.zeros(vector.numel(), dtype=torch.bool)
            heavy[vector.abs().topk(k).indices] = True
            sketch = CountSketch(vector.numel(), rows, cols, draw)
            sketch.add(vector)
            ours += int(heavy[sketch.top_k(4 * k)[0]].sum()) / k / draws
            classic += int(heavy[choose_classic(vector, rows, cols, 4 * k, draw)].sum()) / k / draws
        size = {"d": vector.numel(), "k": k, "rows": rows, "cols": cols, "draws": draws}
        yield about | size | {"ours": ours, "classic": classic}


def choose_classic(vector: Tensor, rows: int, cols: int, k: int, seed: int) -> Tensor:
    """The k coordinates of largest estimate by a Count Sketch with ideal hashes: independent random numbers."""
    generator = torch.Generator().manual_seed(seed)
    estimates = torch.empty(rows, vector.numel())
    for estimate in estimates:
        cell = torch.randint(cols, vector.shape, generator=generator)
        sign = 2.0 * torch.randint(2, vector.shape, generator=generator) - 1.0
        row = torch.zeros(cols).index_add_(0, cell, sign * vector)
        torch.mul(row[cell], sign, out=estimate)
    return estimates.median(dim=0).values.abs().topk(k).indices


def write(rows: list[Row], page: Path = PAGE) -> None:
    """Put the table between its marks."""
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(before + BEGIN + table(rows) + END + rest.partition(END)[2])


def table(rows: list[Row]) -> str:
    """A line for each vector: what is found with three rows and with five, of what a classic sketch finds."""
    lines = ["", "| vector | " + " | ".join(f"{count} rows: classic | ours | share" for count in ROWS) + " |"]
    lines.append("|---|" + "---|" * (3 * len(ROWS)))
    found = {(row["vector"], row["width"], row["rows"]): row for row in rows}
    for vector, width in dict.fromkeys((row["vector"], row["width"]) for row in rows):
        of = [found[vector, width, count] for count in ROWS]
        cells = chain.from_iterable(
            (f"{row['classic']:.3f}", f"{row['ours']:.3f}", f"{row['ours'] / row['classic']:.3f}") for row in of
        )
        name = f"{vector} of {width:,}".replace(",", " ") if width else vector
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", ""])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
