"""What a run reads before it starts."""

from dataclasses import replace
from pathlib import Path

import pytest

from chainfed_engine.config import ChainConfig, DataConfig, RunConfig
from chainfed_engine.config_file import dump_config
from chainfed_engine.federation.inputs import with_own_window

OPEN = RunConfig(ChainConfig(), DataConfig(train="rows.csv", label="label"), "store")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    began = replace(OPEN, chain=replace(OPEN.chain, window=3))
    (tmp_path / "config.toml").write_text(dump_config(began), encoding="utf-8")
    return tmp_path


def test_a_run_taken_up_keeps_the_window_it_began_with_where_it_is_left_open(out: Path) -> None:
    assert with_own_window(OPEN, out, resume=True).chain.window == 3
    assert with_own_window(OPEN, out, resume=False).chain.window is None
    fixed = replace(OPEN, chain=replace(OPEN.chain, window=5))
    assert with_own_window(fixed, out, resume=True).chain.window == 5  # the server refuses it by name


def test_a_damaged_record_leaves_the_window_to_the_plan(out: Path) -> None:
    (out / "config.toml").write_text("[chain", encoding="utf-8")
    assert with_own_window(OPEN, out, resume=True) == OPEN
