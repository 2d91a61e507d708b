"""Settings of all tests."""

import gc
import logging
import os

import pytest
import torch
from hypothesis import settings

from tests.support import nursery, ranks

# Tests run side by side, and threads that wait for each other spin: one thread, here and in what tests start.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# A busy machine is not a failure, and a failure comes again in the next run.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="leave out what starts processes or takes long")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes long; left out by --quick")
    config.addinivalue_line("markers", "early: takes minutes; starts first, for nobody to wait for it in the end")
    config.addinivalue_line("markers", "interpreted: runs on Triton's interpreter")
    ranks.quick = bool(config.getoption("--quick"))


def pytest_unconfigure() -> None:
    """Exchanges that last until the process ends tell of it to nobody."""
    nursery.close()
    logging.getLogger("hvd_sketch").setLevel(logging.WARNING)


def pytest_collection_finish() -> None:
    """What is imported stays: to look for garbage, or for an optimizer's wrapper, need not go through it each time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("early") is None)
    if config.getoption("--quick"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow"))
