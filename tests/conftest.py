"""Settings of all tests."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# A busy machine is not a failure, and a failure comes again in the next run.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Many small operations: threads that wait for each other on a busy machine would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
