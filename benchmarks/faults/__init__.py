"""What happens when a rank fails, on every backend: ``make faults`` writes docs/faults.md."""
