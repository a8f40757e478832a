"""Every command and every Python block of README and guide runs, on a tiny model and tiny data."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import transformers

from tests.conftest import randomise
from tests.docs.pages import ROOT, RUN_PAGES, blocks


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has: a checkpoint and data files."""
    folder = tmp_path_factory.mktemp("desk")
    config = transformers.BertConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    model = transformers.BertModel(config)
    randomise(model)
    for path in (folder / "model", folder / "path" / "to" / "checkpoint"):
        model.save_pretrained(path)
        write_tokenizer(path)
    write_table(folder / "reviews.csv", ("text", "label"), [(f"word {i} film", "ab"[i % 2]) for i in range(240)])
    write_table(folder / "test.csv", ("text", "label"), [(f"word {i} film", "ab"[i % 2]) for i in range(20)])
    tickets = [(f"ticket {i}", "ab"[i % 2], "xyz"[i % 3]) for i in range(60)]
    write_table(folder / "tickets.csv", ("message", "queue", "office"), tickets)
    return folder


def write_tokenizer(path: Path) -> None:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *alphabet])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[], unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    made.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]", "model_max_length": 128}))


def write_table(path: Path, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def run_pages(pages: dict[Path, Path]) -> dict[str, str]:
    """page -> folder; what the runner says of each."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "GOMP_SPINCOUNT": "1000"}
    command = [sys.executable, str(Path(__file__).with_name("run_page.py"))]
    command += [str(path) for pair in pages.items() for path in pair]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def results(desk: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    pages = {}
    for page in RUN_PAGES:
        pages[page] = tmp_path_factory.mktemp(page.stem)
        shutil.copytree(desk, pages[page], dirs_exist_ok=True)
    return run_pages(pages)


@pytest.mark.timeout(700)
@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: page.stem)
def test_every_block_of_the_page_runs(page: Path, results: dict[str, str]) -> None:
    assert results[str(page)] == ""


def test_a_block_that_is_not_run_says_why() -> None:
    reasons = [block.reason for page in RUN_PAGES for block in blocks(page) if block.reason is not None]
    assert reasons and all(len(reason) > 15 for reason in reasons)


WRONG = ["```python\nraise ValueError\n```\n", "```sh\nchainfed plan nothing --budget 1GiB\n```\n", "```sh\nls\n```\n"]


def test_the_runner_sees_failures(tmp_path: Path) -> None:
    pages = {}
    for number, text in enumerate(WRONG):
        page = tmp_path / f"page-{number}.md"
        page.write_text(text)
        pages[page] = tmp_path
    found = list(run_pages(pages).values())
    assert "ValueError" in found[0] and "exit code 2" in found[1] and "`not run:`" in found[2]
