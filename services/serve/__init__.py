"""The teacher's HTTP API: scores rows with the newest verified snapshot."""

from services.serve.config import ServeConfig

__all__ = ["ServeConfig"]
