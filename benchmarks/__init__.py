"""Measurements: each module runs on its own and writes its rows to ``benchmarks/results``."""
