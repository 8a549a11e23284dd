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
quarantine = typer.Typer(help="What the pipeline could not use.", no_args_is_help=True)
app.add_typer(quarantine, name="quarantine")
bench = typer.Typer(help="Measurements, each beside its baseline in the same run.", no_args_is_help=True)
app.add_typer(bench, name="bench")

SettingsFile = Annotated[
    Path, typer.Option("--settings", "-s", help="Settings file (YAML); EXFM_A__B=value overrides a.b.")
]


def main() -> None:
    """Entry point of the console script."""
    from das.errors import ConfigError, ExfmError, Fatal

    try:
        app()
    except ExfmError as error:
        from services.logs import redact

        sys.stderr.write(f"error: {redact(str(error))}\n")
        raise SystemExit(2 if isinstance(error, ConfigError) else 3 if isinstance(error, Fatal) else 1) from None


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


@app.command()
def status(
    settings: SettingsFile,
    once: Annotated[bool, typer.Option("--once", help="Print one picture and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Show state, lag, hit rate, freshness and rates of every process, refreshing."""
    from services.status_command import run

    raise typer.Exit(run(settings, once=once, as_json=as_json))


@app.command()
def doctor(settings: SettingsFile) -> None:
    """Look at everything the pipeline needs; each line is ok or says what to do."""
    from services.doctor import run

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


@quarantine.command("list")
def quarantine_list(
    settings: SettingsFile,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="The newest so many records.")] = 50,
    reason: Annotated[str | None, typer.Option(help="Only records of this reason.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Print time, reason, detail and origin of quarantined records."""
    from services.quarantine import show

    raise typer.Exit(show(settings, limit=limit, reason=reason, as_json=as_json))


@quarantine.command("replay")
def quarantine_replay(
    settings: SettingsFile,
    reason: Annotated[str | None, typer.Option(help="Only records of this reason.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count; send nothing and remember nothing.")] = False,
) -> None:
    """Send quarantined impressions and feedback back to where they were read, each once."""
    from services.quarantine import replay

    raise typer.Exit(replay(settings, reason=reason, dry_run=dry_run))


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


@bench.command("kernels")
def bench_kernels(
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the result rows to.")] = None,
    op: Annotated[str | None, typer.Option(help="Only this op's shapes.")] = None,
    shape: Annotated[str | None, typer.Option(help="Only the shape of this name.")] = None,
    compiled: Annotated[bool, typer.Option(help="With torch.compile among the baselines.")] = True,
    seconds: Annotated[float, typer.Option(help="Leave out baselines that would begin later than this.")] = 1800.0,
    compile_seconds: Annotated[float, typer.Option(help="The same for torch.compile's.")] = 600.0,
    plot: Annotated[
        Path | None, typer.Option(help="Measure nothing; draw the rows of --json's file as this PNG.")
    ] = None,
) -> None:
    """Kernels on a GPU, forward and backward, beside eager PyTorch and torch's own."""
    if plot is not None:
        from services.bench.kernel_plot import draw_file

        if json_file is None:
            raise typer.BadParameter("--plot draws the rows of a file: name it with --json")
        draw_file(json_file, plot)
        return
    from services.bench.kernels import run

    run(op, shape, json_file, compiled=compiled, seconds=seconds, compile_seconds=compile_seconds)


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


@bench.command("zipper")
def bench_zipper(
    json_file: Annotated[Path, typer.Option("--json", help="File to write the result rows to.")],
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Runs of each arm and model.")] = 5,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Also the teacher, and a student distilled from it.")
    ] = False,
    rate: Annotated[
        float | None, typer.Option(min=0.01, max=100, help="Factor of all learning rates; default: each arm chooses.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="File to draw NE over the stream to (PNG).")] = None,
) -> None:
    """Fresh labels, right labels and Zipper's mix on hotel bookings, judged on matured labels."""
    from services.bench.zipper import run

    run(json_file, seeds=seeds, teacher=teacher, rate=rate, plot=plot)


def _given(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


if __name__ == "__main__":
    main()
