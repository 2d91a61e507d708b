"""The tests that need a device, and a row for each."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.gpu.measure import Bench

_TESTS = {"sketch": ("tests/sketch/test_cuda.py", "-k", "gpu"), "exchanges": ("tests/exchange/test_device.py",)}


class _Rows:
    """Records how each test ended."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and not report.failed:
            return
        row = {"device": self._bench.name, "op": "check", "impl": report.nodeid.split("::", 1)[1], "d": 0}
        row["passed"] = report.passed
        if report.failed:
            row["failed"] = report.longreprtext[-2000:]
        self._bench.record.append(row)


def check(name: str) -> Callable[[Bench, int], None]:
    """Run the tests of that name, all of them."""

    def run(bench: Bench, d: int) -> None:
        options = ["-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:faulthandler", "--timeout", "60"]
        pytest.main([*options, *_TESTS[name]], plugins=[_Rows(bench)])

    run.__name__ = f"check_{name}"
    return run


CHECKS = tuple(map(check, _TESTS))
