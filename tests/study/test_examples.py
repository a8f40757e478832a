"""The studies under examples/ ask for what they say, and the small one runs in a tiny form."""

from pathlib import Path

import pytest

from chainfed_engine.cli.main import main
from chainfed_engine.study import load_study

STUDIES = Path(__file__).parents[2] / "examples" / "studies"


@pytest.mark.parametrize(
    ("name", "num_runs"),
    [("small", 4), ("core", 63), ("baselines", 9), ("limited", 42), ("ablation", 42), ("updates", 4)],
)
def test_an_example_study_is_sound_and_as_large_as_it_says(name: str, num_runs: int) -> None:
    study = load_study(STUDIES / f"{name}.toml")
    assert len(study.runs) == num_runs
    assert all(run.config.chain.eval_every > 0 for run in study.runs), "curves need evaluations on the way"
    pairs = {(run.cell, run.seed) for run in study.runs if run.method == study.reference}
    assert {(run.cell, run.seed) for run in study.runs} == pairs, "every run has a reference to be compared with"


def test_the_small_study_runs_in_a_tiny_form(tmp_path: Path, store: Path) -> None:
    words = ("fresh", "rotten")
    rows = "".join(f"{words[i % 2]} film {i},{words[i % 2]},movie {i % 4}\n" for i in range(12))
    (tmp_path / "reviews.csv").write_text("text,label,client\n" + rows)
    values = {
        "run.model.store": store,
        "data.rotten_tomatoes.train": tmp_path / "reviews.csv",
        "data.rotten_tomatoes.eval": tmp_path / "reviews.csv",
        "run.train.sequence_length": 16,
        "run.chain.rounds": 2,
        "run.federation.eval_every": 1,
        "study.methods": '["chain"]',
        "study.reference": "chain",
    }
    options = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    assert main(["study", str(STUDIES / "small.toml"), "--out", str(tmp_path / "out"), *options]) == 0
    assert "| chain |" in (tmp_path / "out" / "table.md").read_text()
