"""Measuring tncompile beside the other ways to run the same model."""
