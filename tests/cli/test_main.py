"""The program's surface: arguments, exit codes, one line an error. The engine behind it is a recording stand-in."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import chainfed_engine
from chainfed_engine.cli.main import main
from chainfed_engine.config import RunConfig
from chainfed_engine.errors import MemoryBudgetExceeded

CONFIG = '[model]\nstore = "store"\n[data]\ntrain = "train.csv"\nlabel = "label"\n[memory]\nbudget = "512MiB"\n'
PLAN = {"predicted_peak_bytes": 5, "parts": {"base": 5}, "choices": {}}


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    calls: list[tuple[Any, ...]] = []

    def plan(store: str, **options: Any) -> Any:
        calls.append(("plan", store, options))
        if options["budget"] < 1 << 20:
            raise MemoryBudgetExceeded("budget 1.0 KiB:\n the smallest that would do is 5 B")
        return SimpleNamespace(table=lambda: "base  5 B", to_json=lambda: PLAN)

    def run(config: RunConfig, out: Path, *, resume: bool, callbacks: Any) -> None:
        on_event = callbacks[0].on_event
        calls.append(("run", config, out, resume))
        on_event({"event": "profile", "round": -1, "start_layer": 2, "cka": []})
        on_event({"event": "round", "round": 0, "rounds": 2, "window": [2, 4], "loss": 0.5})
        on_event({"event": "memory", "peak_rss_bytes": 100 << 20})
        on_event({"event": "eval", "accuracy": 0.75})

    def evaluate(run_dir: Path, data: Path, *, device: str | None) -> dict[str, Any]:
        calls.append(("evaluate", run_dir, data, device))
        return {"accuracy": 0.5, "num_samples": 8.0}

    fake = SimpleNamespace(plan=plan, run=run, evaluate=evaluate, calls=calls)
    monkeypatch.setitem(sys.modules, "chainfed_engine.api", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(chainfed_engine, "api", fake, raising=False)
    return fake


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version_import_no_torch(argument: str) -> None:
    code = (
        "import sys\nfrom chainfed_engine.cli.main import main\n"
        f"try: main(['{argument}'])\nexcept SystemExit as end: assert end.code == 0, end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "chainfed" in done.stdout


def test_the_package_is_a_program() -> None:
    command = [sys.executable, "-m", "chainfed_engine", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, f"chainfed {chainfed_engine.cli.main.__version__}\n")


def test_plan_passes_on_what_was_given_and_prints_table_or_json(
    api: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "store", "--budget", "1GiB", "--window", "3", "--sequence-length", "64"]) == 0
    assert api.calls == [("plan", "store", {"budget": 1 << 30, "window": 3, "sequence_length": 64})]
    assert capsys.readouterr().out == "base  5 B\n"
    assert main(["plan", "store", "--budget", "1GiB", "--task", "causal-lm", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == PLAN


def test_an_error_of_the_engine_is_one_line_and_exit_code_2(
    api: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "store", "--budget", "1024"]) == 2
    shown = capsys.readouterr()
    assert shown.err == (
        "chainfed: error: budget 1.0 KiB: the smallest that would do is 5 B; raise the budget, or lower window, "
        "batch_size or sequence_length\n"
    )
    assert shown.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["plan", "store"], "--budget"),
        (["plan", "store", "--budget", "much"], "expected a size in bytes such as"),
        (["plan", "store", "--budget", "1GiB", "--window", "0"], "expected a whole number of at least 1, got '0'"),
        (["plan", "store", "--budget", "1GiB", "--window", "²"], "expected a whole number of at least 1, got '²'"),
        (["convert", "a", "b", "--format", "int3"], "invalid choice: 'int3'"),
        (["sing"], "invalid choice: 'sing'"),
    ],
)
def test_wrong_arguments_exit_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_run_loads_the_file_with_overrides_and_reports_rounds(
    api: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.toml").write_text(CONFIG)
    arguments = ["run", "config.toml", "--out", "out", "--resume", "--set", "data.train=x.jsonl", "--set", "train.lr=1"]
    assert main(arguments) == 0
    ((_, config, out, resume),) = api.calls
    assert (config.data.train, config.chain.lr) == (str(tmp_path / "x.jsonl"), 1.0)
    assert (out, resume) == (Path("out"), True)
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert lines[:2] == ["reading model and data", "start layer 2"]
    assert lines[2].startswith("round 1/2  layers 2-3  loss 0.5000  ") and lines[2].endswith(" of 512.0 MiB")
    assert lines[3] == "eval  accuracy 0.7500"
    assert shown.out == "out: accuracy 0.7500, peak 100.0 MiB of 512.0 MiB\n"


def test_a_bad_configuration_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG + "budgget = 1\n")
    assert main(["run", str(path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        f"chainfed: error: {path}: [memory] budgget: unknown key; did you mean budget?\n"
    )
    assert not (tmp_path / "out").exists()


def test_eval_prints_scores_or_json(api: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "run", "--data", "test.csv"]) == 0
    assert api.calls == [("evaluate", Path("run"), Path("test.csv"), None)]
    assert capsys.readouterr().out == "accuracy 0.5000  num_samples 8\n"
    assert main(["eval", "run", "--data", "test.csv", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"accuracy": 0.5, "num_samples": 8}


def test_an_interrupt_exits_with_130(
    api: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "evaluate", interrupted)
    assert main(["eval", "run", "--data", "x.csv"]) == 130
    assert capsys.readouterr().err == "chainfed: interrupted\n"


def test_an_interrupted_run_says_how_it_goes_on(
    api: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(config: RunConfig, out: Path, **_: Any) -> None:
        if out.name == "late":
            (out / "state").mkdir(parents=True)
            (out / "state" / "server.safetensors").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "run", interrupted)
    (tmp_path / "config.toml").write_text(CONFIG)
    for name, hint in (("early", False), ("late", True)):
        assert main(["run", str(tmp_path / "config.toml"), "--out", str(tmp_path / name)]) == 130
        said = capsys.readouterr().err
        assert said.endswith("chainfed: interrupted\n") and ("with --resume goes on" in said) == hint


def test_convert_and_synth_pass_formats_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []

    def convert(source: str, destination: str, *, block_format: str, head_format: str | None, progress: Any) -> None:
        calls.append((source, destination, block_format, head_format))
        progress("layer-0000.safetensors", 512, 1024)
        Path(destination).mkdir()
        Path(destination, "layer-0000.safetensors").write_bytes(bytes(2048))

    def synth(shape: str, destination: str, *, block_format: str, head_format: str | None, progress: Any) -> None:
        calls.append((shape, destination, block_format, head_format))

    monkeypatch.setitem(sys.modules, "chainfed_engine.model.convert", SimpleNamespace(convert=convert))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "chainfed_engine.model.synth", SimpleNamespace(synth=synth))  # type: ignore[arg-type]
    store = str(tmp_path / "store")
    assert main(["convert", "model", store, "--head-format", "int8"]) == 0
    assert main(["synth", "--shape", "bert-large", store, "--format", "nf4"]) == 0
    assert calls == [("model", store, "int4", "int8"), ("bert-large", store, "nf4", None)]
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0] == f"{store}: 2.0 KiB in 1 files, layers in int4"
    assert shown.err == "convert 50%  512 B of 1.0 KiB  layer-0000.safetensors\n"
