"""The powers of two by which halves travel: ranks that hold different ones are told, even when they choose alike."""

from __future__ import annotations

import pytest
import torch

from hvd_sketch import RankMismatchError
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import run_in_process
from tests.support.compressors import IN_TURN, TOTAL
from tests.support.simulation import heavy_tailed, make, step


@pytest.mark.parametrize("which", ["cell", "comb", "dense"])
def test_a_rank_with_another_scale_is_told_on_all(which: str) -> None:
    """Of the cells both scales would shift all estimates alike where one rank has all the gradients."""
    gradients = heavy_tailed(2, 6, TOTAL)
    gradients[1] = 0.0

    def body(comm: Communicator) -> str:
        exchange = make(IN_TURN, comm)
        for gradient in gradients[comm.rank, :5]:
            step(exchange, gradient)
        state = exchange.state_dict()
        scales = dict(zip(("cell", "comb", "dense"), state["scales"][-1], strict=True))
        if comm.rank == 1:
            scales[which] = 2.0 * scales[which]
        state["scales"][-1] = tuple(scales.values())
        exchange.load_state_dict(state)
        before = exchange.memory.residual.clone()
        with pytest.raises(RankMismatchError, match="have drifted apart") as error:
            step(exchange, gradients[comm.rank, 5])
        assert torch.equal(exchange.memory.residual, before)
        return str(error.value)

    told = run_in_process(2, body)
    assert len(set(told)) == 1
    assert "state: rank 0 has" in told[0]
