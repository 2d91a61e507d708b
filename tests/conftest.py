"""Settings of all tests."""

import logging
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests.support import ranks

# A busy machine is not a failure, and a failure comes again in the next run.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="leave out what starts processes or takes long")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes long; left out by --quick")
    config.addinivalue_line("markers", "interpreted: runs on Triton's interpreter")
    ranks.quick = bool(config.getoption("--quick"))


def pytest_unconfigure() -> None:
    """Exchanges that last until the process ends tell of it to nobody."""
    logging.getLogger("hvd_sketch").setLevel(logging.WARNING)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Many small operations: threads that wait for each other on a busy machine would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
