"""One function a command: parsed arguments in, exit code out, results on stdout, progress on stderr.

Each imports what it needs when it runs.
"""

import argparse
import json
import sys
from pathlib import Path

from chainfed_engine.sizes import format_size


def convert(options: argparse.Namespace) -> int:
    from chainfed_engine.cli.progress import byte_progress
    from chainfed_engine.model.convert import convert as convert_checkpoint

    with byte_progress("convert") as progress:
        convert_checkpoint(
            options.source,
            options.destination,
            block_format=options.format,
            head_format=options.head_format,
            progress=progress,
        )
    print(f"{options.destination}: {_folder_size(options.destination)}, layers in {options.format}")
    return 0


def synth(options: argparse.Namespace) -> int:
    from chainfed_engine.cli.progress import byte_progress
    from chainfed_engine.model.synth import synth as synthesise

    with byte_progress("synth") as progress:
        synthesise(
            options.shape,
            options.destination,
            block_format=options.format,
            head_format=options.head_format,
            progress=progress,
        )
    print(f"{options.destination}: {_folder_size(options.destination)}, random layers in {options.format}")
    return 0


def plan(options: argparse.Namespace) -> int:
    from chainfed_engine import api

    names = ("budget", "task", "sequence_length", "batch_size", "window", "device")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    prediction = api.plan(options.store, **given)
    print(json.dumps(prediction.to_json(), indent=2) if options.json else prediction.table())
    return 0


def run(options: argparse.Namespace) -> int:
    from chainfed_engine.callbacks import Progress
    from chainfed_engine.config_file import load_config

    device = [] if options.device is None else [f"train.device={options.device}"]
    config = load_config(options.config, [*options.overrides, *device])
    out = Path(options.out)
    with Progress(budget_bytes=config.chain.budget_bytes) as progress:
        progress({"event": "phase", "name": "reading model and data"})
        from chainfed_engine import api  # seconds of imports, under the bar

        try:
            api.run(config, out, resume=options.resume, callbacks=[progress])
        except KeyboardInterrupt:
            if any((out / "state").glob("*")):
                _say(
                    f"chainfed: {out} keeps the rounds that are done; the same command with --resume goes on from there"
                )
            raise
    print(f"{out}: {progress.summary()}")
    return 0


def study(options: argparse.Namespace) -> int:
    from chainfed_engine.study import load_study, run_study

    definition = load_study(options.config, options.overrides)
    out = Path(options.out)
    failed = run_study(definition, out, jobs=options.jobs, only_summary=options.summary, report=_say)
    print((out / "table.md").read_text(encoding="utf-8"), end="")
    if failed:
        _say(
            f"chainfed: {failed} of the runs failed; their logs are in {out / 'logs'}, the next start tries them again"
        )
    return 2 if failed else 0


def evaluate(options: argparse.Namespace) -> int:
    from chainfed_engine import api

    scores = api.evaluate(Path(options.run), Path(options.data), device=options.device)
    if options.json:
        print(json.dumps(scores))
    else:
        shown = (f"{value:.0f}" if name.startswith("num_") else f"{value:.4f}" for name, value in scores.items())
        print("  ".join(f"{name} {value}" for name, value in zip(scores, shown, strict=True)))
    return 0


def export(options: argparse.Namespace) -> int:
    from chainfed_engine.cli.progress import byte_progress
    from chainfed_engine.exports import export as export_run

    with byte_progress("export") as progress:
        done = export_run(
            options.run, options.out, options.to, base=options.base, dtype=options.dtype, progress=progress
        )
    print("\n".join([f"{done.path}: {_path_size(done.path)}, {options.to}", *done.notes]))
    return 0


def report(options: argparse.Namespace) -> int:
    from chainfed_engine.report import write_report

    print(write_report(options.runs, options.out))
    return 0


def doctor(options: argparse.Namespace) -> int:
    from chainfed_engine.cli.doctor import examine, render

    report = examine(disk=options.disk, store=options.store)
    print(json.dumps(report, indent=2) if options.json else render(report))
    return 0 if report["verdict"]["ok"] else 2


def _path_size(path: Path) -> str:
    return _folder_size(str(path)) if path.is_dir() else format_size(path.stat().st_size)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _folder_size(folder: str) -> str:
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return f"{format_size(sum(path.stat().st_size for path in files))} in {len(files)} files"
