"""Suites of `tools/benchmark.py`: a module each, with a function `suite(settings)` that yields rows."""
