"""The `exfm up` process: the supervisor, with a live page beside its health and metrics."""

from __future__ import annotations

from pathlib import Path

from prometheus_client import CollectorRegistry

from das.errors import ConfigError
from das.schema import FeatureSchema
from services.check import check_table
from services.health import HealthConfig, HealthServer, write_address
from services.live import pages
from services.process import Context
from services.process import run as run_process
from services.servers import refuse_an_earlier_run
from services.status import Collector
from services.supervisor import Supervisor

LIVE = "live"


def run(settings_file: Path) -> int:
    """Run the pipeline of `settings_file` until it ends or is asked to stop; returns the exit code."""
    return run_process("up", settings_file, lambda context: supervise(context, settings_file))


def supervise(context: Context, settings_file: Path) -> None:
    """Run the pipeline and serve the live page.

    Raises ConfigError before anything starts, Retryable when a server of yours does not answer, Fatal when the
    pipeline could not be kept running.
    """
    refuse_an_earlier_run(context.settings)
    table = check_table(context.settings, FeatureSchema.load(context.settings.schema_file))
    context.log.info("data set", table=table)
    supervisor = Supervisor(context.settings, settings_file, context.telemetry, lambda text: print(text, flush=True))
    collector = Collector(context.settings.run_dir, supervisor.status)
    live = open_live_page(context, collector)
    collector.start()
    context.set_ready()
    try:
        supervisor.run(context.stop)
    finally:
        collector.close()
        if live:
            live.close()


def open_live_page(context: Context, collector: Collector) -> HealthServer | None:
    """Serve the live page if the settings want it, on loopback only; its address is printed and written to `ports/`."""
    config = context.settings.supervisor
    if not config.live:
        return None
    where = HealthConfig(port=config.live_port)
    try:
        server = HealthServer(where, CollectorRegistry(), context.telemetry.is_ready, pages(collector))
    except OSError as error:
        raise ConfigError(
            f"supervisor.live_port: cannot listen on {config.live_port}: {error}; set 0 or a free port"
        ) from None
    server.start()
    write_address(context.settings.run_dir, LIVE, server.address)
    context.log.info("live page", url=f"http://{server.address}/")
    print(f"live page: http://{server.address}/", flush=True)
    return server
