"""What the reference gives, for comparison."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hvd_sketch import native


@contextmanager
def without_kernel() -> Iterator[None]:
    """Let the reference serve, as where no kernel is built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "available", lambda: False)
        yield
