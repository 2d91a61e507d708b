"""A worker's model between two messages: what it keeps, by the three uses of its memory, and narrow parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hvd_sketch import Compression
from hvd_sketch.methods.flat import FlatParameters
from hvd_sketch.methods.server.codes import Whole
from hvd_sketch.methods.server.message import Header, Kind
from hvd_sketch.methods.server.sparse_codes import sparse_code
from hvd_sketch.methods.server.worker import MemoryUse, Work
from tests.methods.server.support import Vector, flat

COUNT = 64
WHOLE = Whole(COUNT, torch.float32)
TOPK = Compression.topk(ratio=4.0, warmup_steps=0, dense_below=0)


def work_of(parameters: FlatParameters, memory: MemoryUse = "reset", **others: object) -> Work:
    code = sparse_code(TOPK, TOPK.layout([("x", torch.zeros(COUNT))]))
    work = Work(parameters, code, None, memory=memory, **others)  # type: ignore[arg-type]
    answer(work, torch.zeros(COUNT))
    return work


def answer(work: Work, model: Tensor) -> None:
    work.adopt(Header(Kind.MODEL, 1, Whole.number), model.view(torch.uint8))


def sent_by(work: Work) -> Tensor:
    """The update in a worker's next push."""
    number, payload, finite = work.update()
    assert (number, finite) == (1, True)
    update = torch.zeros(COUNT)
    sparse_code(TOPK, TOPK.layout([("x", update)])).add(payload, update)
    return update


@pytest.mark.parametrize("memory", ["reset", "feedback", "none"])
def test_where_a_worker_goes_on_and_what_it_sends_later(memory: MemoryUse) -> None:
    model = Vector(torch.zeros(COUNT))
    work = work_of(flat(model), memory)
    moved = torch.arange(COUNT) * 2.0**-3
    model.x.data.sub_(moved)
    first = sent_by(work)
    rest = moved - first
    assert rest.any()
    server = torch.full((COUNT,), 5.0)
    answer(work, server)
    assert torch.equal(model.x.detach(), server - rest if memory == "reset" else server)
    second = sent_by(work)
    assert torch.equal(work.errors, rest - second if memory != "none" else torch.zeros(COUNT))
    assert second.any() == (memory != "none")


def test_what_a_narrow_dtype_cannot_hold_is_no_part_of_the_next_update() -> None:
    model = Vector(torch.zeros(COUNT, dtype=torch.bfloat16))
    work = work_of(flat(model), "feedback")
    answer(work, torch.full((COUNT,), 1.001))
    assert torch.equal(model.x.detach().float(), torch.ones(COUNT))
    assert not sent_by(work).any()


def test_transforms_act_before_the_memory_in_their_order() -> None:
    model = Vector(torch.zeros(COUNT))
    work = work_of(flat(model), outgoing=[lambda update: update + 1.0, lambda update: update * 2.0])
    model.x.data.sub_(1.0)
    sent = sent_by(work)
    assert torch.equal(work.errors + sent, torch.full((COUNT,), 4.0))


def test_a_saved_worker_has_what_was_under_way() -> None:
    model = Vector(torch.zeros(COUNT))
    work = work_of(flat(model))
    model.x.data.sub_(torch.arange(COUNT).float())
    state = work.state_dict()
    fresh = Vector(torch.zeros(COUNT))
    again = work_of(flat(fresh))
    again.load_state_dict(state)
    answer(again, torch.zeros(COUNT))
    assert torch.equal(fresh.x.detach(), model.x.detach())
    assert torch.equal(sent_by(again), sent_by(work))
