"""The page and the picture of the kernels' measurements: ``docs/benchmarks/kernels.md``, from the rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "kernels.md"

_HEAD = """\
# The kernels, measured

This page is written by `make bench` (`python -m benchmarks.kernels`) from
[`benchmarks/results/kernels.json`](../../benchmarks/results/kernels.json). Measured on {device}.
{gpu}

Times are medians, float32. **clone** is `torch.Tensor.clone` of the same vector, which took its turn after each
measured call. It asks for new memory: above about 32 MB the system hands that out page by page, and a clone then takes
several times what copying to memory at hand would. A clone of 4 MB (1 M coordinates) reuses memory that lies in the
cache, and no sketch is as fast as that: to hash a coordinate takes longer than to move it. Two threads gain nothing
there either, because waking the second one takes as long as its half of the work.

![Time over that of a clone, by size](kernels.svg)

## Against the aims

"""

_NO_GPU = """\
**Nothing was measured on a GPU.** The kernels for it give the reference's bits on Triton's interpreter, and they
compile. How fast they are is not known, nor whether they reach the aim of 0.6 of the device's copy bandwidth."""


@dataclass(frozen=True)
class Aim:
    """What a ratio between two rows should be: at most, or at least, ``bound``."""

    text: str
    bound: float
    most: bool
    ratios: Callable[[list[Row]], Iterator[tuple[Row, float]]]

    def holds(self, ratio: float) -> bool:
        """Whether a ratio is on the right side of the bound."""
        return ratio <= self.bound if self.most else ratio >= self.bound


def write(rows: list[Row], page: Path = PAGE) -> None:
    """Write the page and its picture beside it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    _draw([row for row in rows if not _on_gpu(row)], page.with_name("kernels.svg"))
    devices = ", ".join(sorted({row["device"] for row in rows}))
    aims = (*AIMS, GPU_AIM) if any(map(_on_gpu, rows)) else AIMS
    gpu = "On the GPU, times are those between its events." if GPU_AIM in aims else _NO_GPU
    head = _HEAD.format(device=devices, gpu=gpu)
    parts = [head, *(_against(aim, rows) for aim in aims), "## All rows\n\n", _table(rows)]
    page.write_text("".join(parts))


def _over_clone(op: str) -> Callable[[list[Row]], Iterator[tuple[Row, float]]]:
    def ratios(rows: list[Row]) -> Iterator[tuple[Row, float]]:
        for row in rows:
            if (row["op"], row["impl"]) == (op, "native"):
                yield row, row["seconds"] / row["clone_seconds"]

    return ratios


def _faster_than(op: str, impl: str, *keys: str) -> Callable[[list[Row]], Iterator[tuple[Row, float]]]:
    """Seconds of another way over ours, where sizes agree."""

    def ratios(rows: list[Row]) -> Iterator[tuple[Row, float]]:
        theirs = {_key(row, keys): row for row in rows if (row["op"], row["impl"]) == (op, impl)}
        for row in rows:
            if (row["op"], row["impl"]) == (op, "native") and _key(row, keys) in theirs:
                yield row, theirs[_key(row, keys)]["seconds"] / row["seconds"]

    return ratios


def _two_threads(rows: list[Row]) -> Iterator[tuple[Row, float]]:
    keys = ("op", "d", "rows", "cols", "k")
    ours = [row for row in rows if row["impl"] == "native" and row["op"] in ("add", "top_k")]
    one = {_key(row, keys): row for row in ours if row["threads"] == 1}
    for row in ours:
        if row["threads"] == 2:
            yield row, one[_key(row, keys)]["seconds"] / row["seconds"]


def _slices(rows: list[Row]) -> Iterator[tuple[Row, float]]:
    keys = ("d", "rows", "cols", "threads")
    whole = {_key(row, keys): row for row in rows if (row["op"], row["impl"]) == ("add", "native")}
    for row in rows:
        if row["op"] == "add_slices":
            yield row, row["seconds"] / whole[_key(row, keys)]["seconds"]


AIMS = (
    Aim("`add` takes at most 0.6 of a clone", 0.6, True, _over_clone("add")),
    Aim(
        "`add` is at least 30 times faster than a classic Count Sketch by `index_add_`, its buckets and signs ready",
        30.0,
        False,
        _faster_than("add", "index_add", "d", "rows", "cols", "threads"),
    ),
    Aim("`top_k` takes at most 0.9 of a clone", 0.9, True, _over_clone("top_k")),
    Aim(
        "`top_k` is at least 10 times faster than `torch.topk(v.abs(), k)`",
        10.0,
        False,
        _faster_than("top_k", "topk", "d", "k", "threads"),
    ),
    Aim("Two threads are at least 1.8 times as fast as one", 1.8, False, _two_threads),
    Aim("A vector in 100 slices takes at most 1.1 of the whole one", 1.1, True, _slices),
    Aim(
        "`stage`, a copy and its norm in one pass, is faster than PyTorch's two passes",
        1.0,
        False,
        _faster_than("stage", "torch", "d", "threads"),
    ),
    Aim(
        "`advance`, three changes of the memory in one pass, is faster than the passes one after the other",
        1.0,
        False,
        _faster_than("advance", "passes", "d", "rows", "cols", "threads"),
    ),
)


def _on_gpu(row: Row) -> bool:
    return str(row["device"]).startswith("cuda")


def _bandwidth(rows: list[Row]) -> Iterator[tuple[Row, float]]:
    """Four bytes for each coordinate, against a clone's eight."""
    for row in filter(_on_gpu, rows):
        yield row, row["clone_seconds"] / (2 * row["seconds"])


GPU_AIM = Aim(
    "On the GPU, `add` and `top_k` take a vector's bytes at no less than 0.6 of the bandwidth of a clone, which reads "
    "and writes them",
    0.6,
    False,
    _bandwidth,
)


def _key(row: Row, keys: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(row[key] for key in keys)


def _against(aim: Aim, rows: list[Row]) -> str:
    """How many rows reach the aim at each size, and the ratio of each that does not."""
    lines = [f"### {aim.text}\n\n| coordinates | rows that do | from | to |\n|---:|---:|---:|---:|\n"]
    found = list(aim.ratios(rows))
    for d in sorted({row["d"] for row, _ in found}):
        ratios = [ratio for row, ratio in found if row["d"] == d]
        reached = sum(map(aim.holds, ratios))
        lines.append(f"| {d / 1e6:g} M | {reached} of {len(ratios)} | {min(ratios):.2f} | {max(ratios):.2f} |\n")
    missed = [f"{_shape(row)}: {ratio:.2f}" for row, ratio in found if not aim.holds(ratio)]
    return "".join(lines) + (f"\nMissed by: {'; '.join(missed)}.\n\n" if missed else "\nMissed by none.\n\n")


def _shape(row: Row) -> str:
    k = f", k {row['k']}" if row["k"] else ""
    by = "GPU" if _on_gpu(row) else f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
    table = f", {row['rows']} x {row['cols']}" if row["rows"] else ""
    return f"{row['d'] / 1e6:g} M{table}{k}, {by}"


def _table(rows: list[Row]) -> str:
    lines = ["| op | by | coordinates | rows | cols | k | threads | ms | clone, ms | over clone | runs |\n"]
    lines.append("|---|---|" + "---:|" * 9 + "\n")
    for row in rows:
        ours, clone = 1e3 * row["seconds"], 1e3 * row["clone_seconds"]
        sizes = " | ".join("" if row[key] is None else str(row[key]) for key in ("rows", "cols", "k", "threads"))
        lines.append(
            f"| {row['op']} | {row['impl']} | {row['d'] / 1e6:g} M | {sizes} | {ours:.3f} | {clone:.3f} | "
            f"{ours / clone:.3f} | {row['runs']} |\n"
        )
    return "".join(lines)


def _draw(rows: list[Row], path: Path) -> None:
    """A panel for each number of threads; a point for each row, above its size, at its time over the clone's."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "kernels"
    from matplotlib import pyplot

    ways = list(dict.fromkeys((row["op"], row["impl"]) for row in rows))
    threads = sorted({row["threads"] for row in rows})
    sizes = sorted({row["d"] for row in rows})
    figure, panels = pyplot.subplots(1, len(threads), figsize=(5 * len(threads), 4), sharey=True, squeeze=False)
    for panel, count in zip(panels[0], threads, strict=True):
        for place, way in enumerate(ways):
            mine = [row for row in rows if (row["op"], row["impl"]) == way and row["threads"] == count]
            across = [sizes.index(row["d"]) + 0.1 * (place - (len(ways) - 1) / 2) for row in mine]
            ratios = [row["seconds"] / row["clone_seconds"] for row in mine]
            panel.scatter(across, ratios, s=14, label=" ".join(way), alpha=0.8)
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.set(yscale="log", title=f"{count} thread{'s' * (count > 1)}", xlabel="coordinates")
        panel.set_xticks(range(len(sizes)), [f"{d / 1e6:g} M" for d in sizes])
        panel.grid(axis="y", alpha=0.3)
    panels[0][0].set_ylabel("time over that of a clone")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    figure.set_layout_engine("constrained")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
