"""STUDY.toml: which runs it asks for, whose settings go over whose, and what is said about mistakes."""

from pathlib import Path

import pytest

from chainfed_engine.config_file import load_config
from chainfed_engine.errors import ConfigError
from chainfed_engine.study import load_study
from tests.study.conftest import STUDY


def test_every_method_meets_every_setting_and_seed_and_seeds_come_first(folder: Path) -> None:
    study = load_study(folder / "study.toml")
    assert len(study.runs) == 2 * 3 * 2
    assert [run.seed for run in study.runs] == [0] * 6 + [1] * 6
    assert list(dict.fromkeys(run.cell for run in study.runs)) == [
        ("films", "even"),
        ("films", "skewed"),
        ("by-site", "client"),
    ], "data that names its clients is not partitioned"
    assert len({run.name for run in study.runs}) == len(study.runs)


def test_a_methods_settings_go_over_the_common_ones_and_paths_are_relative_to_the_file(folder: Path) -> None:
    chain, whole = load_study(folder / "study.toml").runs[:2]
    assert (chain.config.chain.method, chain.config.chain.lr) == ("chain", 0.01)
    assert (whole.config.chain.method, whole.config.chain.lr) == ("full-adapters", 0.02)
    assert whole.config.data.train == str(folder / "films.jsonl")
    assert whole.config.store == str(folder / "store")
    (folder / "run.toml").write_text(whole.config_text)
    assert load_config(folder / "run.toml") == whole.config


def test_a_runs_name_follows_its_configuration(folder: Path) -> None:
    before = {run.name for run in load_study(folder / "study.toml").runs}
    changed = {run.name for run in load_study(folder / "study.toml", ["run.train.lr=0.5"]).runs}
    assert len(before & changed) == 6, "the method with a learning rate of its own is not repeated"


def test_overrides_replace_add_and_read_paths_from_the_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    overrides = ["data.films.train=elsewhere.csv", "study.seeds=[7]", "run.memory.budget=1GiB"]
    (first, *_) = load_study(folder / "study.toml", overrides).runs
    assert (first.config.data.train, first.seed, first.config.chain.budget) == ("/elsewhere.csv", 7, 1 << 30)
    quoted = load_study(folder / "study.toml", ['method."everything at once".run.train.lr=0.3']).runs[1]
    assert quoted.config.chain.lr == 0.3


def test_data_can_be_limited_to_some_partitions(folder: Path) -> None:
    limited = STUDY.replace("[data.films]", '[data.films]\npartitions = ["skewed"]')
    (folder / "study.toml").write_text(limited)
    assert {run.cell for run in load_study(folder / "study.toml").runs} == {("films", "skewed"), ("by-site", "client")}
    (folder / "study.toml").write_text(limited.replace('["skewed"]', '["skwed"]'))
    with pytest.raises(ConfigError, match=r"\[data\.films\] partitions: unknown name 'skwed'; did you mean skewed\?"):
        load_study(folder / "study.toml")


def test_a_method_can_be_limited_to_some_data_partitions_and_seeds(folder: Path) -> None:
    text = STUDY.replace(
        'method = "full-adapters"', 'method = "full-adapters"\ndata = ["films"]\npartitions = ["even"]\nseeds = [1]'
    )
    (folder / "study.toml").write_text(text)
    study = load_study(folder / "study.toml")
    own = [run for run in study.runs if run.method == "everything at once"]
    assert [(run.data, run.partition, run.seed) for run in own] == [("films", "even", 1)]
    assert len(study.runs) == 6 + 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('["chain", ', '["chian", ', r"\[study\] methods: unknown method 'chian'; did you mean chain\?"),
        ('["chain", ', '["fedavg-kseed", ', r"unknown method 'fedavg-kseed'; (did you mean fedkseed\?|known: )"),
        ('reference = "every', 'reference = "evry', r"\[study\] reference: .* did you mean everything at once\?"),
        ("[partition.even]", "[partitions.even]", r"unknown table 'partitions'; did you mean partition\?"),
        ("seeds = [0, 1]", "seeds = [0, -1]", r"\[study\] seeds: expected a list of whole numbers"),
        ("seeds = [0, 1]", 'clock = "sun"', r"\[study\] clock: expected 'wall' or 'cpu', got 'sun'"),
        ("seeds = [0, 1]", "sedes = [0]", r"unknown \[study\] key 'sedes'; did you mean seeds\?"),
        ("batch_size = 4", "batchsize = 4", r"method chain, data films, .*: \[train\] batchsize: unknown key; did you"),
        ('label = "label"', 'labels = "label"', r"\[data\] labels: unknown key; did you mean label\?"),
        ('method = "full-adapters"', 'method = "full-adaptors"', r"\[train\] method: .* did you mean full-adapters\?"),
        (
            'method = "full-adapters"',
            'data = ["flims"]',
            r"\[method.everything at once\] data: .* did you mean films\?",
        ),
        ('method = "full-adapters"', 'dat = ["films"]', r"unknown \[method.everything at once\] key 'dat'; did you"),
        ("[study]", "[study", r"study\.toml: not a TOML file"),
    ],
)
def test_a_mistake_is_one_error_before_any_run(folder: Path, old: str, new: str, message: str) -> None:
    assert old in STUDY
    (folder / "study.toml").write_text(STUDY.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        load_study(folder / "study.toml")


def test_a_study_without_data_or_file_is_refused(folder: Path) -> None:
    (folder / "study.toml").write_text('[study]\nmethods = ["chain"]\n')
    with pytest.raises(ConfigError, match=r"expected at least one \[data\.NAME\]"):
        load_study(folder / "study.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_study(folder / "nothing.toml")
    with pytest.raises(ConfigError, match=r"--set lr=1: expected table\.key=value"):
        load_study(folder / "study.toml", ["lr=1"])
