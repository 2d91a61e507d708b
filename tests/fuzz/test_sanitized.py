"""Some seconds, in continuous integration two minutes, of what `make fuzz` does for as long as one likes."""

import os

import pytest

from tests.fuzz.sanitized import attack, race

pytestmark = [pytest.mark.slow, pytest.mark.early, pytest.mark.timeout(500)]  # they build


def test_generated_calls_under_address_and_undefined_behaviour_sanitizers() -> None:
    assert "nothing found" in attack(float(os.environ.get("SECONDS_TO_FUZZ", "15")))


def test_calls_at_the_same_time_under_thread_sanitizer() -> None:
    race(20)
