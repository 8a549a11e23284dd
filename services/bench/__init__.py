"""Benchmarks: each writes rows of one JSON shape, ours beside baselines measured in the same run."""
