"""Ranks that average with their neighbours on a graph in every step."""
