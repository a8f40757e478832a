"""`chainfed doctor STORE`: the checks of the engine's shortcuts hold here, and notice when they do not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chainfed_engine.cli import doctor_model
from chainfed_engine.cli.main import main
from chainfed_engine.prefix.supply import BoundarySupply
from tests.conftest import Checkpoint

Make = Callable[..., Checkpoint]


@pytest.mark.parametrize(("name", "block_format"), [("bert", "f32"), ("llama-tied", "int4"), ("qwen3-sliding", "int8")])
def test_the_checks_hold_on_a_store(
    checkpoint: Make, name: str, block_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint(name, "Model" if name == "bert" else "ForCausalLM", block_format).path
    assert main(["doctor", str(path), "--json"]) == 0
    model = json.loads(capsys.readouterr().out)["model"]
    assert model["store"] == str(path) and model["block_format"] == block_format
    assert len(model["checks"]) == 2 and not any(row["problem"] for row in model["checks"])
    assert model["direct_read_bytes_per_s"] > 0


def test_without_a_store_a_small_model_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "a small random model: llama" in out and out.count("check     ") == 2 and ": yes, " in out


def test_wrong_gradients_and_boundaries_are_found_and_end_in_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gradients, get, calls = doctor_model._gradients, BoundarySupply.get, []

    def wrong(*arguments: Any) -> Any:
        found = gradients(*arguments)
        calls.append(1)
        if len(calls) == 2:
            found["the boundary"][0, 3, 5] += 1e-6
        return found

    monkeypatch.setattr(doctor_model, "_gradients", wrong)
    monkeypatch.setattr(BoundarySupply, "get", lambda self, batch: get(self, batch) * 1.001)
    assert main(["doctor"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "verdict   2 problems, see above"
    assert any("differ by up to" in line for line in lines) and any("off by 0.001" in line for line in lines)


def test_a_store_that_is_none_is_one_error_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path)]) == 2
    assert "expected a folder written by" in capsys.readouterr().err
