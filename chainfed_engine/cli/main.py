"""Entry point of `chainfed`: reads the arguments, runs one command, turns errors into one line and an exit code.

0: done. 2: a ChainfedError (one line, `chainfed: error: ...`, on stderr) or wrong arguments. 130: interrupted (Ctrl-C),
143: terminated (SIGTERM); both end a run in the same orderly way. Anything else that escapes is a bug and keeps its
traceback. Only the command that runs imports torch and the native core, so that `--help` and `--version` answer at
once.
"""

import argparse
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from chainfed_engine._version import __version__
from chainfed_engine.cli import commands, federation
from chainfed_engine.errors import ChainfedError
from chainfed_engine.sizes import parse_size

BLOCK_FORMATS = ("int4", "nf4", "int8", "bf16", "f32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program with `arguments` (None: the process's own) and return its exit code."""
    options = _parser().parse_args(arguments)
    prepare_process()
    try:
        with _termination_interrupts(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return int(options.command(options))
    except ChainfedError as error:
        line = " ".join(str(error).split())
        print(f"chainfed: error: {line}", file=sys.stderr)
        return 2
    except _Terminated:
        print("chainfed: terminated", file=sys.stderr)
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print("chainfed: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output went away (`chainfed plan ... | head`): nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


class _Terminated(KeyboardInterrupt):
    """SIGTERM, as batch systems and `kill` send it: a run and the processes it started end as after Ctrl-C."""


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread
        return

    def interrupt(*_: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def prepare_process() -> None:
    """Settings that must stand before torch is imported: returned heap goes back to the system, torch's large tensors
    take huge pages where they fill them, and OpenMP's threads sleep soon after their work instead of spinning on the
    cores that the native kernels' threads need."""
    from chainfed_engine.memory.lean import keep_heap_lean

    keep_heap_lean()
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # about 10 microseconds


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"chainfed: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chainfed", description="Fine-tune language models layer by layer under a hard memory budget."
    )
    parser.add_argument("--version", action="version", version=f"chainfed {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_store_commands(subparsers)
    _add_run_commands(subparsers)
    federation.add_commands(subparsers)
    doctor = subparsers.add_parser("doctor", help="check this machine, and a model on it, by trying")
    doctor.add_argument("store", metavar="STORE", nargs="?", help="check this model (default: a small random one)")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.add_argument("--disk", metavar="DIR", help="folder whose disk is measured (default: the temporary folder)")
    doctor.set_defaults(command=commands.doctor)
    return parser


def _add_store_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    convert = subparsers.add_parser("convert", help="a checkpoint (folder, hub id or GGUF file) into a layer store")
    convert.add_argument("source", metavar="SRC", help="folder or hub id with safetensors, or a .gguf file")
    convert.add_argument("destination", metavar="DST", help="folder of the store to write")
    _add_format(convert)
    convert.set_defaults(command=commands.convert)

    synth = subparsers.add_parser("synth", help="a store of a given shape with random weights, for trials of memory")
    synth.add_argument("--shape", required=True, metavar="NAME|CONFIG.json", help="such as llama-3.2-1b, bert-large")
    synth.add_argument("destination", metavar="DST", help="folder of the store to write")
    _add_format(synth)
    synth.set_defaults(command=commands.synth)

    plan = subparsers.add_parser("plan", help="predict the peak memory of a run; refuse what does not fit")
    plan.add_argument("store", metavar="STORE")
    plan.add_argument("--budget", required=True, type=_size, help="bytes, or text such as 512MiB, 1GB")
    plan.add_argument("--task", choices=("classification", "causal-lm"), help="default: what the model is made for")
    plan.add_argument("--sequence-length", type=_positive, metavar="TOKENS")
    plan.add_argument("--batch-size", type=_positive, metavar="SEQUENCES")
    plan.add_argument("--window", type=_positive, metavar="LAYERS")
    _add_device(plan)
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.set_defaults(command=commands.plan)


def _add_run_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    run = subparsers.add_parser("run", help="the whole federation in this process")
    run.add_argument("config", metavar="CONFIG.toml")
    run.add_argument("--out", required=True, metavar="DIR", help="run directory to write")
    run.add_argument("--resume", action="store_true", help="go on with a run that was cut off in DIR")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="TABLE.KEY=VALUE",
        help="override the file, for example --set data.train=PATH (may be given again)",
    )
    _add_device(run)
    run.set_defaults(command=commands.run)

    study = subparsers.add_parser("study", help="methods x data x partitions x seeds: a run each, tables and curves")
    study.add_argument("config", metavar="STUDY.toml")
    study.add_argument("--out", required=True, metavar="DIR", help="folder of the study; finished runs are kept there")
    study.add_argument("--jobs", type=_positive, default=1, metavar="N", help="runs at a time (default: 1)")
    study.add_argument("--summary", action="store_true", help="run nothing: tables and page of what is finished")
    study.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="TABLE.KEY=VALUE",
        help="override the file, for example --set data.ag_news.train=PATH (may be given again)",
    )
    study.set_defaults(command=commands.study)

    evaluate = subparsers.add_parser("eval", help="accuracy or token loss of a run, under the same budget")
    evaluate.add_argument("run", metavar="DIR", help="run directory")
    evaluate.add_argument("--data", required=True, metavar="FILE", help="CSV, TSV, JSON, JSONL or Parquet")
    _add_device(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.set_defaults(command=commands.evaluate)

    export = subparsers.add_parser("export", help="a LoRA run for other tools: PEFT, llama.cpp, or merged weights")
    export.add_argument("run", metavar="DIR", help="run directory")
    export.add_argument("out", metavar="OUT", help="folder to write (gguf: file)")
    export.add_argument("--to", required=True, choices=("peft", "gguf", "merged"))
    export.add_argument(
        "--base", metavar="PATH", help="the original checkpoint (folder, hub id or .gguf), for exact merged weights"
    )
    export.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "f32", "bf16", "f16"),
        help="of merged weights (default: the model's)",
    )
    export.set_defaults(command=commands.export)

    report = subparsers.add_parser("report", help="one HTML page with the plots of a run, or comparing several")
    report.add_argument("runs", metavar="DIR", nargs="+", help="run directory; several are compared")
    report.add_argument("--out", metavar="FILE", help="page to write (default: report.html in DIR; for several, here)")
    report.set_defaults(command=commands.report)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="cpu|cuda|cuda:N", help="where to compute (default: [train] device)")


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", default="int4", choices=BLOCK_FORMATS, help="of layers (default: int4)")
    parser.add_argument("--head-format", choices=BLOCK_FORMATS, help="of embeddings and head")


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
