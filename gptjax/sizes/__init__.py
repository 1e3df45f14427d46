"""Across sizes of a model: a law of scale, and whether updates keep their size."""
