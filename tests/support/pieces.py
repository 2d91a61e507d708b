"""Writing to pieces of a vector, against writing to all of it without the kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_sketch.sparse.places import Places
from tests.support.without_kernel import without_kernel


def check_pieces(places: Places, before: Tensor, values: Tensor, *, clear: bool, edges: Sequence[int]) -> None:
    """Every piece, from each second edge to the next, gets what the whole vector has there."""
    whole = torch.zeros_like(before) if clear else before.clone()
    with without_kernel():
        places.put(whole, values)
    within = sorted(edge for edge in edges if edge <= before.numel())
    spans = {start: stop for start, stop in zip(within[::2], within[1::2], strict=False) if start < stop}
    pieces = {start: before[start:stop].clone() for start, stop in spans.items()}
    places.put_in_pieces(pieces, values, clear=clear)
    for start, stop in spans.items():
        assert torch.equal(pieces[start], whole[start:stop])
