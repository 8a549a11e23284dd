"""Replays a recorded table as the impressions and feedback that a serving system would have logged."""
