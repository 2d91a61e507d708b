"""The tests that need a device, and a row for each."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest

from benchmarks.gpu.measure import Bench

_TESTS = {
    "kernels": ("tests/sketch", "tests/error_feedback", "tests/exchange", "tests/test_gpu.py", "-k", "gpu"),
    "exchanges": ("tests/exchange/test_device.py",),
    "ranks": ("tests/frontends/test_ddp_device.py", "--timeout", "300"),
}
_IN_TURN = ("ranks",)
"""Those whose tests look at one launch of ranks, and so belong into one process."""
_PROCESSES = 6
"""Of pytest-xdist, where that is installed: much of the time is that of compiling kernels."""


class _Rows:
    """Records how each test ended."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and not report.failed:
            return
        row = {"device": self._bench.name, "op": "check", "impl": report.nodeid.rpartition("/")[2], "d": 0}
        row["passed"] = report.passed
        if report.failed:
            row["failed"] = report.longreprtext[-2000:]
        self._bench.record.append(row)


def check(name: str) -> Callable[[Bench, int], None]:
    """Run the tests of that name, all of them."""

    def run(bench: Bench, d: int) -> None:
        options = ["-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:faulthandler", "--timeout", "60"]
        if find_spec("xdist") is not None and name not in _IN_TURN:
            options += ["-n", str(_PROCESSES)]
        pytest.main([*options, *_TESTS[name]], plugins=[_Rows(bench)])

    run.__name__ = f"check_{name}"
    return run


CHECKS = tuple(map(check, _TESTS))
