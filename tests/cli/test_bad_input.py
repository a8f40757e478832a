"""Bad input through the program: exit code 2, one line that says what to do, and nothing new on disk."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers
from safetensors.numpy import save_file

from chainfed_engine.cli.main import main
from chainfed_engine.model.synth import synth
from tests.small_bert import SMALL_BERT

CONFIG = """
[model]
store = "store"
[data]
train = "train.csv"
eval = "eval.csv"
label = "label"
client = "site"
[chain]
rounds = 1
window = 1
adapter_size = 4
[train]
batch_size = 2
sequence_length = 16
"""
TRAIN = "text,label,site\ngood film,good,a\nbad film,bad,a\nfine film,good,b\npoor film,bad,b\n"
EVAL = "text,label\ngood film,good\nbad film,bad\n"
LAYER = "layer-0001.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, data, configuration, and the run `out` made from them."""
    folder = tmp_path_factory.mktemp("finished")
    synth(SMALL_BERT, folder / "store", "int4")
    for name, text in (("run.toml", CONFIG), ("train.csv", TRAIN), ("eval.csv", EVAL)):
        (folder / name).write_text(text)
    assert main(["run", str(folder / "run.toml"), "--out", str(folder / "out")]) == 0
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `finished` that a test may damage; the working directory."""
    copy = shutil.copytree(finished, tmp_path / "work")
    config = copy / "out" / "config.toml"  # its paths are absolute
    config.write_text(config.read_text().replace(str(finished), str(copy)))
    monkeypatch.chdir(copy)
    return copy


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> str:
    """The one line of error; every file in `folder` is as it was."""
    before = contents(folder)
    capsys.readouterr()
    assert main(arguments) == 2
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line != "reading model and data"]
    assert len(lines) == 1 and lines[0].startswith("chainfed: error: "), shown.err
    assert shown.out == ""
    assert contents(folder) == before
    return lines[0]


def refused_run(capsys: pytest.CaptureFixture[str], folder: Path, *overrides: str) -> str:
    options = [word for override in overrides for word in ("--set", override)]
    return refused(capsys, folder, "run", "run.toml", "--out", "new", *options)


def test_a_store_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere: no store.json" in refused_run(capsys, folder, "model.store=nowhere")
    assert "nowhere: no store.json" in refused(capsys, folder, "plan", "nowhere", "--budget", "1GiB")


def test_a_store_that_was_moved_since_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "store").rename(folder / "elsewhere")
    line = refused(capsys, folder, "eval", "out", "--data", "eval.csv")
    assert "store: no store.json" in line and "out/config.toml, [model] store; correct it there" in line


def test_a_truncated_layer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(folder / "store" / LAYER, 5000)
    assert f"{LAYER}: 5000 bytes, store.json says" in refused_run(capsys, folder)
    assert f"{LAYER}: 5000 bytes, store.json says" in refused(capsys, folder, "plan", "store", "--budget", "1GiB")
    (folder / "store" / LAYER).unlink()
    assert LAYER in refused_run(capsys, folder)


@pytest.mark.parametrize("name", [LAYER, "embedding.safetensors", "tokenizer/tokenizer.json"])
def test_one_flipped_bit(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path = folder / "store" / name
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    assert path.name in refused_run(capsys, folder)
    assert path.name in refused(capsys, folder, "eval", "out", "--data", "eval.csv")


def test_a_store_without_a_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(folder / "store" / "tokenizer")
    assert "tokenizer.json: missing" in refused_run(capsys, folder)
    content = json.loads((folder / "store" / "store.json").read_text())
    content |= {"tokenizer": False, "tokenizer_files": []}
    (folder / "store" / "store.json").write_text(json.dumps(content))
    assert "put the model's tokenizer.json there" in refused_run(capsys, folder)


def test_a_checkpoint_of_an_unknown_architecture(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = folder / "gpt2"
    checkpoint.mkdir()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = {"model_type": "gpt2", **sizes, "vocab_size": 300, "max_position_embeddings": 32}
    (checkpoint / "config.json").write_text(json.dumps(config))
    save_file({"wte.weight": np.zeros((300, 32), np.float32)}, checkpoint / "model.safetensors")
    line = refused(capsys, folder, "convert", "gpt2", "converted")
    assert "'gpt2': expected one of bert, roberta, distilbert, llama" in line


def test_a_checkpoint_that_is_quantised_already_or_an_adapter_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    config = checkpoint / "config.json"
    config.write_text(json.dumps({**SMALL_BERT, "quantization_config": {"quant_method": "awq", "bits": 4}}))
    save_file({"qweight": np.zeros((4, 4), np.int32)}, checkpoint / "model.safetensors")
    line = refused(capsys, folder, "convert", "checkpoint", "converted")
    assert "config.json: the weights are quantised already (quantization_config: 'awq'); convert the original" in line
    config.rename(checkpoint / "adapter_config.json")
    assert "an adapter alone" in refused(capsys, folder, "convert", "checkpoint", "converted")


def test_a_store_of_a_newer_format(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "store" / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    assert "version 99; this engine reads 1; install one that reads it" in refused_run(capsys, folder)


def test_adapters_that_were_damaged_are_written_again_by_taking_the_run_up(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "out" / "adapters.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-9], b"", None):
        path.unlink() if content is None else path.write_bytes(content)
        line = refused(capsys, folder, "eval", "out", "--data", "eval.csv")
        assert ("not found" if content is None else "take the run up with --resume, which writes it again") in line
        assert main(["run", "run.toml", "--out", "out", "--resume"]) == 0
        assert path.read_bytes() == whole


@pytest.mark.parametrize("source", ["nowhere/at/all", "store", "train.csv"])
def test_a_source_that_is_no_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str], source: str) -> None:
    line = refused(capsys, folder, "convert", source, "converted")
    assert source in line and ("is a layer store already" in line) == (source == "store")


def test_an_unknown_label(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "eval.csv").write_text("text,label\nodd film,odd\n")
    known = "line 2: unknown label 'odd'; the model was trained on 'bad', 'good'"
    assert known in refused(capsys, folder, "eval", "out", "--data", "eval.csv")
    assert known in refused_run(capsys, folder)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.sequence_length=33", "the model has positions for 32 tokens, got 33"),
        ("chain.window=4", "expected 1 to 3 layers (the model's depth), got 4"),
        ("chain.start_layer=3", "start_layer: expected 0 to 2 (3 layers less a window of 1), got 3"),
        ("memory.budget=8MiB", "budget 8.0 MiB: the smallest that would do is"),
        ("chain.windw=2", "[chain] windw: unknown key; did you mean window?"),
        ("train.window=2", "[train] window: unknown key; window belongs in [chain]"),
        ("train.lr=nan", "[train] lr: expected a number above 0"),
        ("data.train=nowhere.csv", "nowhere.csv: no such file"),
        ("data.text=txet", "no column 'txet'; there are 'text', 'label', 'site'"),
        ("data.client=none", "4 rows cannot give each of 8 clients one; lower num_clients"),
    ],
)
def test_choices_that_cannot_be_kept(
    folder: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert message in refused_run(capsys, folder, override)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--sequence-length", "33", "positions for 32 tokens"),
        ("--window", "4", "expected 1 to 3 layers"),
        ("--task", "causal-lm", "bert at store has no LM head"),
    ],
)
def test_plan_refuses_what_run_would(
    folder: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    arguments = {"--sequence-length": "16", option: value}
    words = [word for pair in arguments.items() for word in pair]
    assert message in refused(capsys, folder, "plan", "store", "--budget", "1GiB", *words)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("text,label,site\n", "train.csv: expected at least one row, got none"),
        (TRAIN + "lost film,good,\n", "train.csv, line 6: column 'site': expected a name"),
        (TRAIN + ",good,a\n", "train.csv, line 6: column 'text' is blank"),
        (TRAIN + "torn\n", "train.csv, line 6: expected 3 values, got 1"),
        ("text,label,site\nfilm,good,a\n", "expected at least two labels, got only 'good'"),
    ],
)
def test_data_that_cannot_be_used(folder: Path, capsys: pytest.CaptureFixture[str], rows: str, message: str) -> None:
    (folder / "train.csv").write_text(rows)
    assert message in refused_run(capsys, folder)


def test_an_output_that_cannot_be_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "shape.json").write_text(json.dumps(SMALL_BERT))
    assert "train.csv/run: cannot" in refused(capsys, folder, "run", "run.toml", "--out", "train.csv/run")
    assert "train.csv/new" in refused(capsys, folder, "synth", "--shape", "shape.json", "train.csv/new")
    assert "store: exists" in refused(capsys, folder, "synth", "--shape", "shape.json", "store", "--format", "nf4")


def test_a_directory_that_holds_a_run_and_one_that_holds_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = refused(capsys, folder, "run", "run.toml", "--out", "out")
    assert "out: holds a run already; take it up with --resume or choose another folder" in again
    assert "new: no run to resume here" in refused(capsys, folder, "run", "run.toml", "--out", "new", "--resume")
    assert "new/adapters.safetensors: not found; expected the directory of a run" in refused(
        capsys, folder, "eval", "new", "--data", "eval.csv"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("chain.adapter_size=8", "resume: adapter_size was 4 in the saved run and is 8 now"),
        ("data.train=other.csv", "resume: the data's labels differ from the saved run's"),
    ],
)
def test_a_run_is_not_taken_up_as_another(
    folder: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    (folder / "other.csv").write_text(TRAIN.replace("good,", "great,"))
    (folder / "eval.csv").write_text(EVAL.replace(",good", ",great") if "other" in override else EVAL)
    arguments = ["run", "run.toml", "--out", "out", "--resume", "--set", override]
    assert message in refused(capsys, folder, *arguments)


@pytest.mark.filterwarnings("always:.*no tokenizer")
def test_a_warning_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {key: value for key, value in SMALL_BERT.items() if key != "architectures"}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder / "checkpoint")
    capsys.readouterr()
    assert main(["convert", "checkpoint", "converted"]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("convert ")]
    assert len(warnings) == 1 and warnings[0].startswith("chainfed: warning: checkpoint: the store has no tokenizer")
