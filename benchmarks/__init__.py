"""Timing of batch normalization, bnext beside its peers; start with `python -m benchmarks.run --help`."""
