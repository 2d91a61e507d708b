"""The methods of others that ours are compared with: special cases in which they are something simple."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.accuracy.rivals import Blocks, DeMo, SparseLoCo, pack, unpack
from hvd_sketch.comm import Communicator
from hvd_sketch.comm.in_process import run_in_process
from tests.support.training import flat, net, train


@pytest.mark.parametrize("shape", [(7,), (128,), (96, 130), (6, 5, 3, 3), (1, 1)])
def test_blocks_come_together_again(shape: tuple[int, ...]) -> None:
    blocks, tensor = Blocks(shape), torch.randn(shape)
    cut = blocks.split(tensor)
    assert cut.shape == (blocks.count, blocks.numel)
    assert torch.equal(blocks.join(cut), tensor)
    mixed = blocks.mix(cut)
    torch.testing.assert_close(torch.linalg.vector_norm(mixed), torch.linalg.vector_norm(tensor))
    torch.testing.assert_close(blocks.mix(mixed, inverse=True), cut)


@pytest.mark.parametrize("width", [1, 2, 6, 12])
def test_numbers_take_as_few_bytes_as_their_bits_need(width: int) -> None:
    numbers = torch.randint(2**width, (5, 7))
    packed = pack(numbers, width)
    assert len(packed) == -(-5 * 7 * width // 8)
    assert torch.equal(unpack(packed, width, (5, 7)), numbers)


def on_two_ranks(make: Any, steps: int) -> list[tuple[nn.Module, int]]:
    start = net()

    def body(comm: Communicator) -> tuple[nn.Module, int]:
        model = copy.deepcopy(start)
        train(make(torch.optim.SGD(model.parameters(), 0.01), comm), model, range(steps), comm.rank)
        return model, comm.bytes_sent

    return run_in_process(2, body)


def test_demo_that_sends_everything_steps_by_the_sign_of_the_mean_gradient() -> None:
    (one, _), (other, _) = on_two_ranks(lambda optimizer, comm: DeMo(optimizer, comm, 1e-3), 1)
    assert torch.equal(flat(one), flat(other))
    gradients = [_gradient(rank) for rank in range(2)]
    step = (flat(net()) - flat(one)) / 0.01
    mean = (gradients[0] + gradients[1]) / 2
    sure = mean.abs() > 1e-2 * mean.abs().max()  # half precision has no say there
    torch.testing.assert_close(step[sure], mean.sign()[sure], rtol=0, atol=1e-4)


def _gradient(rank: int) -> Tensor:
    model = net()
    train(torch.optim.SGD(model.parameters(), 1.0), model, range(1), rank)
    return flat(net()) - flat(model)


def test_sparse_loco_that_sends_much_averages_the_local_models() -> None:
    (one, _), (other, _) = on_two_ranks(lambda optimizer, comm: SparseLoCo(optimizer, comm, 1e-3, 3), 3)
    assert torch.equal(flat(one), flat(other))
    ends = []
    for rank in range(2):
        model = net()
        train(torch.optim.SGD(model.parameters(), 0.01), model, range(3), rank)
        ends.append(flat(model))
    moved, expected = flat(one) - flat(net()), (ends[0] + ends[1]) / 2 - flat(net())
    assert torch.nn.functional.cosine_similarity(moved, expected, dim=0) > 0.85  # of two bits


@pytest.mark.parametrize("ratio", [20.0, 100.0])
def test_bytes_are_what_the_ratio_asks_for(ratio: float) -> None:
    parameter = nn.Parameter(torch.randn(256, 256))
    makes = (lambda o, c: DeMo(o, c, ratio), lambda o, c: SparseLoCo(o, c, ratio, 4))

    def body(comm: Communicator) -> list[float]:
        ratios = []
        for make in makes:
            mine = nn.Parameter(parameter.detach().clone())
            optimizer, before = make(torch.optim.SGD([mine], 0.01), comm), comm.bytes_sent
            for _ in range(8):
                mine.grad = torch.randn_like(mine)
                optimizer.step()
            dense = 8 * 2 * (comm.size - 1) / comm.size * 4 * parameter.numel()
            ratios.append(dense / (comm.bytes_sent - before))
        return ratios

    for found in run_in_process(4, body)[0]:
        assert found == pytest.approx(ratio, rel=0.1)
