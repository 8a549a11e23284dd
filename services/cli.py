"""The command line: `exfm <command>`. Heavy imports live inside the commands, so that `exfm --help` is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="exfm",
    help="Streaming teacher-student distillation for click and conversion prediction.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
topics = typer.Typer(help="The Kafka topics of a pipeline.", no_args_is_help=True)
app.add_typer(topics, name="topics")
bench = typer.Typer(help="Measurements, each beside its baseline in the same run.", no_args_is_help=True)
app.add_typer(bench, name="bench")

SettingsFile = Annotated[
    Path, typer.Option("--settings", "-s", help="Settings file (YAML); EXFM_A__B=value overrides a.b.")
]


def main() -> None:
    """Entry point of the console script."""
    from das.errors import ConfigError, ExfmError

    try:
        app()
    except ExfmError as error:
        from services.logs import redact

        sys.stderr.write(f"error: {redact(str(error))}\n")
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None


def _version(show: bool) -> None:
    if show:
        from services.process import version

        typer.echo(version())
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def replay(
    settings: SettingsFile,
    speed: Annotated[str | None, typer.Option(help="'max', 'realtime', or a factor of event time.")] = None,
    rows: Annotated[int | None, typer.Option(help="Replay only the first rows.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Parquet, CSV or JSON lines file, in place of the mapping's.")
    ] = None,
) -> None:
    """Produce a recorded data set to impressions and feedback, in event-time order."""
    from services.replay_main import run

    raise typer.Exit(run(settings, _given(speed=speed, limit=rows, data=data)))


@app.command()
def das(settings: SettingsFile) -> None:
    """Join impressions and feedback into examples."""
    from services.das_main import run

    raise typer.Exit(run(settings))


@app.command()
def teacher(settings: SettingsFile) -> None:
    """Score every example once, write its logits, then train on it."""
    from services.teacher_main import run

    raise typer.Exit(run(settings))


@app.command()
def student(name: Annotated[str, typer.Argument(help="A student of the settings.")], settings: SettingsFile) -> None:
    """Train one student on examples and the teacher's logits."""
    from services.student_main import run

    raise typer.Exit(run(name, settings))


@app.command()
def serve(settings: SettingsFile) -> None:
    """Answer HTTP requests with the teacher's newest snapshot."""
    from services.serve_main import run

    raise typer.Exit(run(settings))


@app.command()
def up(settings: SettingsFile) -> None:
    """Run every process of the settings on this machine, with a live page."""
    from services.up import run

    raise typer.Exit(run(settings))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder; nothing is written elsewhere.")] = Path("runs/demo"),
    device: Annotated[str, typer.Option(help="Device of the teacher: cpu or cuda.")] = "cpu",
    speed: Annotated[str, typer.Option(help="'max', 'realtime', or a factor of event time.")] = "max",
    seed: Annotated[int, typer.Option(help="Seed of every model.")] = 1,
    rows: Annotated[int | None, typer.Option(help="Replay only the first rows.")] = None,
) -> None:
    """Replay KuaiRand-Pure through the whole loop and print what distillation did."""
    from services.demo.run import run

    raise typer.Exit(run(out, device=device, speed=speed, seed=seed, rows=rows))


@app.command()
def export(
    name: Annotated[str, typer.Argument(help="A student of the settings.")],
    settings: SettingsFile,
    to: Annotated[Path, typer.Option(help="Folder to write the serving graph to.")],
) -> None:
    """Write a student's serving graph (torch.export and ONNX) from its newest snapshot, and check parity."""
    from services.student_main import export as export_student

    raise typer.Exit(export_student(name, settings, to))


@app.command()
def check(settings: SettingsFile) -> None:
    """Validate every section of a settings file, and print the resolved settings without secrets."""
    from services.check import run

    raise typer.Exit(run(settings))


@topics.command("create")
def topics_create(settings: SettingsFile) -> None:
    """Create the topics that are missing, with the partitions of the settings."""
    from services.topics import create

    raise typer.Exit(create(settings))


@topics.command("describe")
def topics_describe(settings: SettingsFile) -> None:
    """Print the topics with their partitions and first and next offsets."""
    from services.topics import describe

    raise typer.Exit(describe(settings))


@bench.command("demo")
def bench_demo(
    json_file: Annotated[Path, typer.Option("--json", help="File to write the result rows to.")],
    out: Annotated[Path, typer.Option(help="Folder of the run folders.")] = Path("runs/bench-demo"),
    device: Annotated[str, typer.Option(help="Device of the teacher; the baseline runs it on cpu.")] = "cuda",
    rows: Annotated[int | None, typer.Option(help="Rows of the full-speed runs.")] = None,
    pace: Annotated[float, typer.Option(help="Event time per wall time of the paced runs.")] = 6000.0,
    paced_rows: Annotated[int, typer.Option(help="Rows of the paced runs.")] = 60_000,
) -> None:
    """Throughput and latency of the demo's loop with the teacher on a device."""
    from services.bench.demo import run

    run(json_file, out, device=device, rows=rows, pace=pace, paced_rows=paced_rows)


@bench.command("das")
def bench_das(
    json_file: Annotated[Path, typer.Option("--json", help="File to write the result rows to.")],
    events: Annotated[
        int, typer.Option(min=1000, help="Events whose memory is measured; sizes the rest.")
    ] = 10_000_000,
    kafka: Annotated[str | None, typer.Option(help="host:port of a broker; default: an embedded one.")] = None,
    redis: Annotated[
        str | None, typer.Option(help="URL of an empty Redis database, emptied again; default: an embedded one.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each measurement; the median counts.")] = 3,
) -> None:
    """Speed and memory of the logit store, speed of examples and joiner."""
    from services.bench.das import run

    run(json_file, events=events, kafka=kafka, redis=redis, repeats=repeats)


def _given(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


if __name__ == "__main__":
    main()
