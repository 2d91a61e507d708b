"""Whether a saved state fits: found out before any of it is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MOST_TOLD = 5

Form = Any
"""What a state must look like.

A dict or a list has the form of each entry; a tensor stands for those of its shape and dtype, all finite; a type for
its values, numbers neither negative nor infinite, and ``object`` for any; see also the classes below.
"""


@dataclass(frozen=True)
class Maybe:
    """None, or what has this form."""

    form: Form


@dataclass(frozen=True)
class Equal:
    """This number or text and no other."""

    value: Any


@dataclass(frozen=True)
class Vector:
    """A vector of this dtype, of any length."""

    dtype: torch.dtype


def unfit(saved: Any, form: Form) -> str | None:
    """Why a rank's saved memory cannot be loaded, and what to do; None if it can."""
    found = list(differences(saved, form))
    if not found:
        return None
    more = f"; and {len(found) - _MOST_TOLD} more" if len(found) > _MOST_TOLD else ""
    return (
        f"the saved memory does not fit, and none of it was loaded: {'; '.join(found[:_MOST_TOLD])}{more}. Load each "
        "rank's own, with the model, compressor, momentum correction, schedule and error_feedback it was saved with; "
        "or flush() one step before saving, and load none"
    )


def differences(saved: Any, form: Form, where: str = "") -> Iterator[str]:
    """What of a saved state has another form."""
    name = where or "the state"
    if form is object:
        return
    if isinstance(form, Maybe):
        if saved is not None:
            yield from differences(saved, form.form, where)
    elif isinstance(form, Equal):
        if type(saved) is not type(form.value) or saved != form.value:
            yield _unequal(name, saved, form.value)
    elif isinstance(form, dict):
        yield from _of_dicts(saved, form, name, where)
    elif isinstance(form, (list, tuple)):
        if not isinstance(saved, (list, tuple)):
            yield f"{name} is {_told(saved)}, not a list"
        elif len(saved) != len(form):
            yield f"{name} has {len(saved)} entries, here {len(form)}"
        else:
            for number, (one, own) in enumerate(zip(saved, form, strict=True)):
                yield from differences(one, own, f"{where}[{number}]")
    elif isinstance(form, (Tensor, Vector)):
        yield from _of_tensors(saved, form, name)
    else:
        yield from _of_numbers(saved, form, name)


def _of_dicts(saved: Any, form: dict[str, Form], name: str, where: str) -> Iterator[str]:
    if not isinstance(saved, dict):
        yield f"{name} is {_told(saved)}, not a dict"
        return
    for key in form:
        if key in saved:
            yield from differences(saved[key], form[key], f"{where}.{key}" if where else key)
        else:
            yield f"{name} has no {key!r}"
    for key in saved:
        if key not in form:
            yield f"{name} has {key!r}, which is unknown here"


def _of_tensors(saved: Any, form: Tensor | Vector, name: str) -> Iterator[str]:
    if not isinstance(saved, Tensor):
        yield f"{name} is {_told(saved)}, not a tensor"
    elif saved.dtype != form.dtype or saved.dim() != 1 if isinstance(form, Vector) else _kind(saved) != _kind(form):
        yield f"{name} is {_told(saved)}, here {_told(form)}"
    elif saved.is_floating_point() and saved.numel() and not all(map(math.isfinite, _ends(saved))):
        yield f"{name} has values that are not finite"


def _of_numbers(saved: Any, form: type, name: str) -> Iterator[str]:
    if form is float and isinstance(saved, int) and not isinstance(saved, bool):
        saved = float(saved)
    if type(saved) is not form:
        yield f"{name} is {_told(saved)}, not {form.__name__}"
    elif isinstance(saved, (int, float)) and (saved < 0 or math.isinf(saved)):
        yield f"{name} is {saved}"


def _ends(values: Tensor) -> list[float]:
    """The least and the largest; not a number where there is one."""
    return [float(end) for end in torch.aminmax(values)]


def _unequal(name: str, saved: Any, ours: Any) -> str:
    """Of long texts, the first words that differ."""
    if isinstance(saved, str) and isinstance(ours, str):
        pairs = zip([*saved.split(), "nothing"], [*ours.split(), "nothing"], strict=False)
        saved, ours = next(((one, own) for one, own in pairs if one != own), (saved, ours))
    return f"{name} is {saved!r}, here {ours!r}"


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.dtype, *tensor.shape)


def _told(value: Any) -> str:
    if isinstance(value, (Tensor, Vector)):
        shape = list(value.shape) if isinstance(value, Tensor) else "[any]"
        return f"a tensor {str(value.dtype).removeprefix('torch.')}{shape}"
    return "None" if value is None else f"of type {type(value).__name__}"
