"""All kernels for a GPU, without one: on Triton's interpreter and as compiled code, each in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.triton import compile_all, compiles, interpret, starts_interpreter

MODULES = (
    "tests.compressors.test_powersgd",
    "tests.error_feedback.test_anticipate_cuda",
    "tests.error_feedback.test_moments_cuda",
    "tests.exchange.test_staging_cuda",
    "tests.sketch.test_cuda",
    "tests.sketch.test_narrow",
    "tests.sparse.test_codec_cuda",
    "tests.sparse.test_cuda",
    "tests.test_mixing",
)

pytestmark = [pytest.mark.slow, pytest.mark.early, pytest.mark.timeout(600)]


@starts_interpreter
def test_on_the_interpreter_they_do_as_the_reference(tmp_path: Path) -> None:
    interpret(tmp_path, MODULES)


@compiles
def test_they_compile_and_nothing_is_fused_or_flushed(tmp_path: Path) -> None:
    """For one kind of GPU; for another, ``python -m tests.support.triton 80 MODULE …``."""
    compile_all(tmp_path, MODULES, 90)
