"""Kunlun's mechanisms, one per file."""
