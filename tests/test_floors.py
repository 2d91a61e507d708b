"""The floors of the house: a module imports what stands below it, or beside it without a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hvd_sketch

ROOT = Path(hvd_sketch.__file__).parent
FLOORS = (
    ("__init__", "__main__"),
    ("ddp",),
    ("frontends",),
    ("error_feedback",),
    ("methods",),
    ("compressors",),
    ("schedules",),
    ("stock", "compatibility"),
    ("exchange",),
    (
        *("memory", "memory_cuda", "mixing", "mixing_cuda", "layout", "shards"),
        *("wire", "grid", "saved", "stats", "scope", "instances"),
    ),
    ("sketch", "sparse", "comm"),
    ("native", "gpu", "precision", "bits", "settings"),
    ("errors", "version"),
)
HEIGHT = {room: len(FLOORS) - number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join(["hvd_sketch", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def imported(path: Path) -> Iterator[str]:
    """Our modules that a file imports: anywhere in it, for types alone, or late by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in names if node.module in MODULES)
        elif isinstance(node, ast.Constant) and node.value in MODULES and node.value != "hvd_sketch":
            yield node.value


def room(module: str) -> str:
    return f"{module}.__init__".split(".")[1]


IMPORTS = {module: set(imported(path)) for module, path in MODULES.items()}


@pytest.mark.parametrize("module", MODULES)
def test_no_import_runs_upwards(module: str) -> None:
    above = [other for other in IMPORTS[module] if HEIGHT[room(other)] > HEIGHT[room(module)]]
    assert not above


def test_no_import_runs_in_a_circle() -> None:
    TopologicalSorter(IMPORTS).prepare()


FACTORIES = {
    "arange",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
}
COUNTING = {"arange", "randint", "randperm"}


def careless(path: Path) -> Iterator[str]:
    """Tensors that a script's default device or default type would change."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES:
            given = {keyword.arg for keyword in node.keywords}
            wanted = {"device"} if node.func.attr in COUNTING else {"device", "dtype"}
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and not wanted <= given:
                yield f"line {node.lineno}: torch.{node.func.attr} without {', '.join(sorted(wanted - given))}"


@pytest.mark.parametrize("module", MODULES)
def test_every_tensor_names_its_device_and_type(module: str) -> None:
    assert not list(careless(MODULES[module]))
