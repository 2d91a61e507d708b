"""The compression ratio of a step: fixed functions of the step, and schedules that learn from the steps."""
