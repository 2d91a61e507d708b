"""Some seconds of what continuous integration does for two minutes, and `make fuzz` for as long as one likes."""

import pytest

from tests.fuzz.sanitized import attack, race

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]  # they build


def test_generated_calls_under_address_and_undefined_behaviour_sanitizers() -> None:
    assert "nothing found" in attack(15.0)


def test_calls_at_the_same_time_under_thread_sanitizer() -> None:
    race(20)
