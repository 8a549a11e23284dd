"""Measurements: each writes one result document, with the machine, the versions and the baseline of the same run."""
