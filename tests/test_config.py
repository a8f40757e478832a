import dataclasses
import math
from pathlib import Path

import pytest

from chainfed_engine.config import ChainConfig, DataConfig, RunConfig
from chainfed_engine.config_file import dump_config, load_config
from chainfed_engine.errors import ConfigError

MINIMAL = '[model]\nstore = "store"\n[data]\ntrain = "train.csv"\nlabel = "label"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert config.store == str(tmp_path / "store")
    assert config.data.train == str(tmp_path / "train.csv")
    assert config.data.task == "classification"
    assert config.data.columns == ("text", "label")


def test_every_table_is_read(tmp_path: Path) -> None:
    text = MINIMAL + (
        "alpha = 1\nnum_clients = 3\n[chain]\nstart_layer = 2\nschedule = 'train-and-freeze'\n"
        "[train]\nlr = 0.01\n[memory]\nbudget = '512MiB'\n[federation]\nclients_per_round = 4\n"
    )
    config = load_config(write(tmp_path, text))
    assert config.chain.start_layer == 2
    assert config.chain.schedule == "train-and-freeze"
    assert config.chain.budget == 512 << 20
    assert config.chain.clients_per_round == 4
    assert (config.data.alpha, config.data.partition) == (1.0, "dirichlet")


def test_dump_reads_back_equal(tmp_path: Path) -> None:
    data = DataConfig(train='/data/a "b"\\\x7f\t.csv', response="answer", prompt="Frage ä", num_clients=2)
    config = RunConfig(ChainConfig(budget=1 << 30, lr=1e-5, start_layer=None, stand_in=False), data, "/stores/x")
    assert load_config(write(tmp_path, dump_config(config))) == config
    assert 'start_layer = "auto"' in dump_config(config)
    assert 'partition = "iid"' in dump_config(config), "what was auto is recorded resolved"


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        ("[train]\nlerning_rate = 1.0", r"config\.toml: \[train\] lerning_rate: unknown key"),
        ("[train]\nbatchsize = 1", r"\[train\] batchsize: unknown key; did you mean batch_size\?"),
        ("[train]\nwindow = 1", r"\[train\] window: unknown key; window belongs in \[chain\]"),
        ("[trian]\nlr = 1.0", r"\[trian\]: unknown table; did you mean train\?"),
        ("[train]\nbatch_size = 1.5", r"\[train\] batch_size: expected a whole number, got 1\.5"),
        ("[train]\nbatch_size = true", r"\[train\] batch_size: expected a whole number, got True"),
        ("[train]\nlr = 0", r"\[train\] lr: expected a number above 0 up to 10, got 0\.0"),
        ("[train]\nlr = nan", r"\[train\] lr: expected a number above 0"),
        ("[train]\nlr = '1e-3'", r"\[train\] lr: expected a number, got '1e-3'"),
        ("[chain]\nschedule = 'continous'", r"\[chain\] schedule: expected one of .* did you mean continuous\?"),
        ("[chain]\nstart_layer = 'none'", r"\[chain\] start_layer: expected a whole number or \"auto\", got 'none'"),
        ("[chain]\nstand_in = 1", r"\[chain\] stand_in: expected true or false, got 1"),
        ("[chain]\nprobe_rounds = 30", r"\[chain\] probe_rounds: expected at most \[chain\] rounds \(24\)"),
        ("[chain]\nprobe_rounds = 20\nrefit_rounds = 5", r"refit_rounds: .* \(24\) - probe_rounds, got 5"),
        ("[memory]\nbudget = '1 Gigabyte'", r"\[memory\] budget: expected a size in bytes such as"),
        ("[memory]\nbudget = 17", r"\[memory\] budget: expected a number from 1048576"),
        ("response = 'answer'", r"\[data\]: expected .* got label and response"),
    ],
)
def test_mistakes_name_file_table_key_and_remedy(tmp_path: Path, addition: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(tmp_path, MINIMAL + addition + "\n"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"\[model\] store: expected the path"),
        ("store = 'x'", r"store: expected a table \[store\]"),
        ("[model", "not a TOML file"),
        ("[model]\nstore = 's'", r"\[data\] train: expected the path"),
        ("[model]\nstore = 's'\n[data]\ntrain = 'a'", r"\[data\]: expected .* got none of them"),
        (
            "[model]\nstore = 's'\n[data]\ntrain = 'a'\nresponse = 'b'\npartition = 'dirichlet'",
            r"\"dirichlet\" needs \[data\] label",
        ),
    ],
)
def test_incomplete_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_what_is_learned_is_no_part_of_the_text() -> None:
    for columns in ({"label": "text"}, {"text": "title + mark", "label": "mark"}, {"response": "prompt"}):
        with pytest.raises(ConfigError, match="expected other columns than"):
            DataConfig("train.csv", **columns)
    assert DataConfig("train.csv", messages="prompt").task == "causal-lm", "the prompt is not read there"


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "\ufeff" + MINIMAL)) == load_config(write(tmp_path, MINIMAL))


def test_a_missing_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        load_config(tmp_path / "none.toml")


def test_overrides_replace_keys_and_take_paths_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    path = write(tmp_path / "sub", MINIMAL)
    overrides = ["data.train=2020.csv", "train.lr=1e-4", "memory.budget=1GiB", "chain.start_layer=auto", "data.label=1"]
    config = load_config(path, overrides)
    assert config.data.train == str(tmp_path / "2020.csv")
    assert config.store == str(tmp_path / "sub" / "store")
    assert (config.chain.lr, config.chain.budget, config.chain.start_layer) == (1e-4, 1 << 30, None)
    assert config.data.label == "1"


@pytest.mark.parametrize("override", ["train.lr", "lr=1", "train.lrr=1", "train.batch_size=many"])
def test_a_bad_override_is_named(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--set {override}: "):
        load_config(write(tmp_path, MINIMAL), [override])


def test_python_configurations_are_checked_too() -> None:
    assert ChainConfig(budget="1GiB").budget == 1 << 30  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"\[chain\] window: expected a number from 1"):
        ChainConfig(window=0)
    with pytest.raises(ConfigError, match=r"\[train\] lr"):
        dataclasses.replace(ChainConfig(), lr=math.inf)


def test_every_field_has_a_table_and_numbers_a_range() -> None:
    for record in (ChainConfig, DataConfig):
        for item in dataclasses.fields(record):
            assert item.metadata["table"] in {"model", "data", "chain", "train", "memory", "baseline", "federation"}
            assert item.metadata["low"] <= item.metadata["high"]


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "examples").glob("*.toml")), ids=lambda p: p.name)
def test_the_examples_load_and_read_back(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert load_config(write(tmp_path, dump_config(config))) == config
    assert config.chain.budget is not None
