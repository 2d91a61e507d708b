"""The example of SketchedSGD in plain PyTorch: the steps of ours, at the same sizes and draws."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from hvd_sketch import Compression
from hvd_sketch.comm import as_communicator
from hvd_sketch.sketch.geometry import Geometry, cells_and_signs
from tests.support.ranks import ROOT, launch, python, ranks
from tests.support.simulation import heavy_tailed, make, step

EXAMPLE = ROOT / "examples" / "sketched_sgd.py"
SHAPES = {"weight": (60, 80)}


def largest_difference() -> float:
    """Over thirty steps and all ranks; relative to the largest value of an update."""
    from mpi4py import MPI

    sys.path.insert(0, str(EXAMPLE.parent))
    import sketched_sgd as example

    def draw(dim: int, rows: int, cols: int, step: int) -> tuple[Tensor, Tensor]:
        return cells_and_signs(Geometry(dim, rows, cols), step, torch.arange(dim))

    example.draw = draw
    comm, worst = MPI.COMM_WORLD, 0.0
    compressor = Compression.sketch(rows=example.ROWS, cols=example.COLS, k=example.K, half=False, clip_norm=None)
    ours = make(compressor, as_communicator(comm), SHAPES)
    theirs = example.SketchedSGD([torch.zeros(SHAPES["weight"])], lr=1.0, comm=comm)
    for gradient in heavy_tailed(comm.size, 30, 4800)[comm.rank]:
        update, expected = step(ours, gradient), theirs.exchange(gradient)
        assert torch.equal(update != 0, expected != 0)
        worst = max(worst, float((update - expected).abs().max() / expected.abs().max()))
    return worst


@pytest.mark.parametrize("size", [1, 3])
def test_it_takes_the_steps_of_the_compressor(size: int) -> None:
    assert max(ranks(size, largest_difference)) < 1e-5


def test_it_trains_in_at_most_eighty_lines_without_us() -> None:
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) <= 80
    assert "import hvd_sketch" not in text
    told = launch(2, python(EXAMPLE)).output
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in told.splitlines() if "loss" in line]
    assert losses[-1] < losses[0] / 5
