"""`exfm bench das`: the logit store, the decoding of examples, and the joiner, each beside its baseline."""

from __future__ import annotations

import tempfile
from pathlib import Path

from services.bench import das_examples, das_joiner, das_store
from services.bench.document import Row, write
from services.embedded import Server, start_broker, start_redis


def run(json_file: Path, *, events: int, kafka: str | None, redis: str | None, repeats: int) -> list[Row]:
    """Measure everything and write the rows. `events` sizes the store's memory; the rest is in proportion to it.

    `kafka` (host:port) and `redis` (a URL with an empty database) name servers of your own; embedded ones otherwise,
    Redis without its append-only file. Raises ConfigError on a database that is not empty, and Fatal when what was
    measured is not right.
    """
    servers: list[Server] = []
    with tempfile.TemporaryDirectory(prefix="exfm-bench-") as name:
        folder = Path(name)
        try:
            if redis is None:
                servers.append(start_redis(folder / "redis", append_only=False))
                redis = f"redis://{servers[-1].address}/0"
            rows = das_store.measure(redis, events=events // 10, memory_events=events, repeats=repeats)
            rows += das_examples.measure(rows=min(32_768, events // 200), repeats=repeats)
            if kafka is None:
                servers.append(start_broker(folder / "broker"))
                kafka = servers[-1].address
            rows += das_joiner.measure(kafka, folder, impressions=events // 50, repeats=repeats)
        finally:
            for server in servers:
                server.stop()
    write(json_file, "das", rows)
    return rows
