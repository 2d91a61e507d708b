"""Triton's kernels without a GPU: interpreted, or compiled and read."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import pytest

_Test = TypeVar("_Test", bound=Callable[..., object])
INTERPRETED = "TRITON_INTERPRET" in os.environ
INSTALLED = importlib.util.find_spec("triton") is not None
_UNFIT = INSTALLED and metadata.version("triton") < "3.7" and metadata.version("numpy") >= "2.4"

_only_interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, on Triton's interpreter")
starts_interpreter = pytest.mark.skipif(
    INTERPRETED or not INSTALLED or _UNFIT, reason="needs Triton, and for its interpreter a NumPy no newer than that"
)
compiles = pytest.mark.skipif(INTERPRETED or not INSTALLED, reason="needs Triton")


def on_interpreter(test: _Test) -> _Test:
    """Mark a test that `interpret` runs."""
    marked: _Test = pytest.mark.interpreted(_only_interpreted(test))
    return marked


def in_another_process(tmp_path: Path, *arguments: str, **environment: str) -> None:
    """The kernels are bound to the interpreter or the compiler when they are imported: once per process."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def interpret(tmp_path: Path, modules: Iterable[str]) -> None:
    """Run those tests of some modules that are for the interpreter."""
    files = [f"{module.replace('.', '/')}.py" for module in modules]
    options = ["-q", "-x", "-p", "no:cacheprovider", "--durations=5", "-m", "interpreted"]
    in_another_process(tmp_path, "-m", "pytest", *options, *files, TRITON_INTERPRET="1")


def compile_all(tmp_path: Path, modules: Iterable[str], capability: int) -> None:
    """Compile the ``kernels()`` of some test modules for a GPU; see `_compile`."""
    in_another_process(tmp_path, "-m", "tests.support.triton", str(capability), *modules)


def _compile(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], capability: int) -> None:
    """Neither a subnormal taken for zero nor, unless its name says so, a fused product and sum.

    Either would change the bits of a result.
    """
    import triton  # type: ignore[import-untyped]
    from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]

    types = {each.name: pointers.get(each.name, "i64") for each in kernel.params} | dict.fromkeys(
        constants, "constexpr"
    )
    source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=constants)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": False})
    wrong = re.findall(r"fma\S*|mad\S*f32|\S+ftz\S*|div[.]full\S*|rsqrt[.]approx\S*", compiled.asm["ptx"])
    if kernel.__name__.endswith("_fused"):
        wrong = [each for each in wrong if not each.startswith("fma")]
    assert not wrong, (kernel.__name__, wrong)


if __name__ == "__main__":
    for module in sys.argv[2:]:
        for its_kernel, its_pointers, its_constants in importlib.import_module(module).kernels():
            _compile(its_kernel, its_pointers, its_constants, int(sys.argv[1]))
