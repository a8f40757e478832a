import json
from pathlib import Path

import pytest

from chainfed_engine import native
from chainfed_engine.cli import doctor
from chainfed_engine.cli.main import main


def test_every_level_of_this_machine_is_launched_and_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--disk", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["level"] for row in report["kernels"]] == native.simd_levels()
    assert report["verdict"] == {"ok": True, "problems": []}
    assert report["cpu"]["simd_in_force"] == native.simd_level()
    assert report["versions"]["torch"]


def test_the_text_ends_in_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--disk", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "verdict   this machine is ready"


def test_a_kernel_that_is_wrong_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = native.linear_forward

    def wrong(matrix: object, x: object, bias: object, *, out: object, **rest: object) -> None:
        right(matrix, x, bias, out=out, **rest)  # type: ignore[arg-type]
        out[1, 7] += 0.01  # type: ignore[index]

    monkeypatch.setattr(doctor.native, "linear_forward", wrong)
    assert main(["doctor", "--disk", str(tmp_path)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("verdict   ") and "problem" in lines[-1]
    assert any("f32 linear off by" in line for line in lines)


def test_an_unwritable_disk_is_one_error_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--disk", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("chainfed: error: ")
