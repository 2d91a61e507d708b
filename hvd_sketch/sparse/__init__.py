"""Few coordinates out of many: which they are, how they are written to a vector, and how they travel."""
