"""Settings of all tests."""

from hypothesis import settings

# A busy machine is not a failure, and a failure comes again in the next run.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")
