"""Whether the kernel is the one that was meant, and is given what it expects."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hvd_sketch import native
from hvd_sketch.native import sources
from hvd_sketch.sketch import CountSketch
from hvd_sketch.sparse.chosen import Chosen
from hvd_sketch.sparse.codec import SparseCodec


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the package looks for its kernel, with none in it."""
    native._load.cache_clear()
    monkeypatch.setattr(native, "__file__", str(tmp_path / "__init__.py"))
    yield tmp_path
    native._load.cache_clear()


@pytest.mark.slow  # builds
@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("int nothing;", "older than this package"),
        ('long kernel_abi() {{ return 1; }} const char* kernel_sources() {{ return "{digest}"; }}', "has ABI 1"),
        ('long kernel_abi() {{ return {abi}; }} const char* kernel_sources() {{ return "0"; }}', "other sources"),
    ],
)
def test_another_kernel_is_not_called(code: str, told: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = folder / "other.c"
    source.write_text(code.format(abi=native.ABI, digest=sources.digest()))
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(folder / "_kernel.so")], check=True, timeout=60)
    with caplog.at_level(logging.WARNING):
        assert not native.available()
    assert told in caplog.text
    assert "pip install" in caplog.text
    sketch = CountSketch(9, 3, 4)
    sketch.add(torch.ones(9))
    assert sketch.table.any()


def test_every_source_counts(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    seen = {sources.digest(tmp_path)}
    for file, content in (("a.cpp", "1"), ("part/b.hpp", "1"), ("part/b.hpp", "2"), ("a.cpp", "12"), ("c.cpp", "")):
        (tmp_path / file).write_text(content)
        seen.add(sources.digest(tmp_path))
    assert len(seen) == 6
    (tmp_path / "other.py").write_text("1")
    assert sources.digest(tmp_path) in seen


def test_the_kernel_gets_what_it_expects_or_nothing() -> None:
    for wrong in (
        torch.zeros(8),
        torch.zeros(9, dtype=torch.float64),
        torch.zeros(18)[::2],
        torch.zeros(9).to("meta"),
    ):
        with pytest.raises(ValueError, match="9 contiguous values of torch.float32"):
            native.address(wrong, torch.float32, 9)
    with pytest.raises(ValueError, match="6 contiguous values of torch.int64"):
        SparseCodec(100, 3).encode(torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, 3))
    with pytest.raises(ValueError, match="3 contiguous values of torch.float32"):
        Chosen(torch.arange(3)).put(torch.zeros(9), torch.ones(2))
