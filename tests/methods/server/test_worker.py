"""A worker's model between two messages: what it keeps, by the three uses of its memory, and narrow parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hvd_sketch import Compression, ConfigurationError
from hvd_sketch.compressors import Sparsifier
from hvd_sketch.methods.flat import FlatParameters
from hvd_sketch.methods.server import Mean, Rule, ZenoPSAsync
from hvd_sketch.methods.server.codes import Whole
from hvd_sketch.methods.server.message import Header, Kind
from hvd_sketch.methods.server.sparse_codes import sparse_code
from hvd_sketch.methods.server.worker import MemoryUse, Transform, Work
from tests.methods.server.support import Server, Vector, flat

COUNT = 64
WHOLE = Whole(COUNT, torch.float32)
TOPK = Compression.topk(ratio=4.0, warmup_steps=0, dense_below=0)


def slope(model: torch.nn.Module, number: int) -> Tensor:
    """A loss on trusted data with the same long gradient everywhere."""
    return 1e3 * model.get_parameter("x").sum()


def work_of(parameters: FlatParameters, memory: MemoryUse = "reset", **others: object) -> Work:
    code = sparse_code(TOPK, TOPK.layout([("x", torch.zeros(COUNT))]))
    work = Work(parameters, code, None, memory=memory, **others)  # type: ignore[arg-type]
    answer(work, torch.zeros(COUNT))
    return work


def answer(work: Work, model: Tensor) -> None:
    work.adopt(Header(Kind.MODEL, 1, Whole.number), model.view(torch.uint8))


@pytest.mark.parametrize(
    "transform", [lambda update: update[:3], lambda update: None, torch.Tensor.double], ids=["part", "none", "double"]
)
def test_a_transform_that_makes_no_update_is_told(transform: Transform) -> None:
    work = work_of(flat(Vector(torch.zeros(COUNT))), outgoing=[transform])
    with pytest.raises(
        ConfigurationError, match=r"outgoing: .* like the update that it is given, \(64,\) torch.float32"
    ):
        work.update()


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


@pytest.mark.parametrize(
    ("up", "rule", "weight"),
    [(TOPK, Mean(), 1 / 3), (None, Mean(), 1 / 3), (TOPK, ZenoPSAsync(slope, rate=1.0), 0.8)],
    ids=["mean, top-k", "mean, whole: local SGD", "ZenoPS"],
)
def test_with_error_reset_nothing_is_lost_by_any_rule(up: Sparsifier | None, rule: Rule, weight: float) -> None:
    """The server's model, less what workers have not sent by their weights, moves by what they moved."""
    code = WHOLE if up is None else sparse_code(up, up.layout([("x", torch.zeros(COUNT))]))
    server, generator = Server(rule, torch.zeros(COUNT), (1, 2, 3), up=code), torch.Generator().manual_seed(0)
    models = {worker: Vector(torch.zeros(COUNT)) for worker in (1, 2, 3)}
    works = {worker: Work(flat(model), code, None, memory="reset") for worker, model in models.items()}
    total = torch.zeros(COUNT)
    for _ in range(5):
        for worker, work in works.items():
            answer(work, server.models[worker])
            moved = torch.rand(COUNT, generator=generator) - 0.2  # not against the trusted slope
            models[worker].x.data.sub_(moved)
            total += moved
        for worker, work in works.items():
            number, payload, _ = work.update()
            header = Header(Kind.PUSH, server.versions.pop(worker), number)
            server.take(server.store.push(worker, header, payload, True, 0.0))
    unsent = torch.stack([work.errors for work in works.values()]).sum(0)
    assert unsent.any() == (up is not None)
    torch.testing.assert_close(server.model - weight * unsent, -weight * total, rtol=1e-5, atol=1e-5)


def test_what_the_model_holds_before_the_first_and_after_the_last_message_is_no_work() -> None:
    model = Vector(torch.ones(COUNT))
    work = Work(flat(model), WHOLE, None, memory="reset")
    assert not work.state_dict()["errors"].any()
    answer(work, torch.zeros(COUNT))
    model.x.data.sub_(1.0)
    assert (work.state_dict()["errors"] == 1.0).all()
    work.rest()
    assert not work.state_dict()["errors"].any()


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
