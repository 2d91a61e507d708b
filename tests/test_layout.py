"""The layout: every coordinate has one place, the same on all ranks, and unfit parameters are named."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hvd_sketch.errors import ConfigurationError
from hvd_sketch.layout import Layout, describe_values, small_or_named

NAMES = st.text("ab.1", min_size=1, max_size=4)
SIZES = st.lists(st.integers(0, 40), max_size=3)


def layout_of(named: dict[str, Tensor], dense_below: int = 100, exclude: tuple[str, ...] = ()) -> Layout:
    return Layout.of(named.items(), small_or_named(dense_below, exclude))


@given(st.dictionaries(NAMES, SIZES, min_size=1, max_size=6))
def test_slots_tile_the_vector_whatever_the_order_of_the_parameters(shapes: dict[str, list[int]]) -> None:
    named = {name: torch.empty(shape) for name, shape in shapes.items()}
    layout = layout_of(named)
    assert layout == layout_of(dict(reversed(named.items())))
    ends = [0, *(slot.stop for slot in layout.slots)]
    assert [slot.offset for slot in layout.slots] == ends[:-1]
    assert ends[-1] == layout.total == sum(p.numel() for p in named.values())
    assert [layout.slots[position].name for position in layout.index().values()] == list(layout.index())
    for slot in layout.slots:
        whole = len(slot.shape) <= 1 or slot.numel < 100
        assert (slot.offset >= layout.compressed) == whole or slot.numel == 0


def test_compressed_coordinates_come_first_and_each_part_is_ordered_by_name() -> None:
    """The fifteen, item 14: biases and norms are sent whole by default, others by size or by name."""
    layout = layout_of(
        {
            "z.weight": torch.empty(20, 20),
            "a.bias": torch.empty(500),
            "norm.weight": torch.empty(64),
            "scale": torch.tensor(1.0),
            "small.weight": torch.empty(9, 11),
            "embedding.weight": torch.empty(50, 50),
            "b.weight": torch.empty(10, 10),
        },
        exclude=("*embedding*",),
    )
    assert [slot.name for slot in layout.slots[:2]] == ["b.weight", "z.weight"]
    assert [slot.name for slot in layout.slots[2:]] == sorted(slot.name for slot in layout.slots[2:])
    assert layout.compressed == 500
    assert layout.dense == layout.total - 500


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="named_parameters is empty"):
        layout_of({})


def test_duplicate_names_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="'w' occurs more than once.*prefix the names"):
        Layout.of([("w", torch.empty(3)), ("v", torch.empty(3)), ("w", torch.empty(4))], small_or_named(1))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.bool])
def test_dtypes_that_cannot_be_sketched_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ConfigurationError, match=f"'phase' has dtype {dtype}.*optimizer of its own"):
        layout_of({"w": torch.empty(3, 3), "phase": torch.empty(3, 3, dtype=dtype)})


def test_parameters_without_values_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="'b' is on the meta device and has no values"):
        layout_of({"a": torch.empty(3, 3), "b": torch.empty(3, 3, device="meta")})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_are_told_apart_by_every_bit(dtype: torch.dtype) -> None:
    values = torch.arange(1.0, 25.0, dtype=dtype).view(2, 3, 2, 2)
    parameters = {"w": values, "empty": torch.empty(0, 3), "scale": torch.tensor(2.0)}
    told = describe_values(parameters)
    assert [part.split("=")[0] for part in told.split()] == ["empty", "scale", "w"]
    strided = {**parameters, "w": values.to(memory_format=torch.channels_last)}
    assert describe_values(strided) == told
    negated = {**parameters, "w": values.clone().index_put_([torch.tensor([1])] * 4, -values[1, 1, 1, 1])}
    assert describe_values(negated).split()[:2] == told.split()[:2]
    assert describe_values(negated) != told
