"""The live page of a running pipeline: one HTML file and one JSON document, on loopback."""

from __future__ import annotations

import importlib.resources
import json

from services.health import Page
from services.status import Collector


def pages(collector: Collector) -> dict[str, Page]:
    """Routes for a HealthServer: `/` and `/status.json`."""
    html = importlib.resources.files("services.live").joinpath("page.html").read_bytes()

    def status() -> tuple[str, bytes]:
        body = {"now": collector.latest, "history": list(collector.history)}
        return "application/json", json.dumps(body, allow_nan=False).encode()

    return {"/": lambda: ("text/html; charset=utf-8", html), "/status.json": status}
