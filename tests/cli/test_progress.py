import io

import pytest

from chainfed_engine.cli.progress import RunProgress, byte_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_every_event_is_a_plain_line() -> None:
    stream = io.StringIO()
    with RunProgress(budget_bytes=1 << 30, stream=stream) as progress:
        progress({"event": "phase", "name": "reading"})
        progress({"event": "resume", "round": 3, "skipped_states": []})
        progress({"event": "profile", "start_layer": None})
        progress({"event": "round", "round": 3, "rounds": 9, "window": [0, 2], "loss": None})
        progress({"event": "round", "round": 4, "rounds": 9, "window": [6, 6], "loss": 0.25, "more": object()})
        progress({"event": "something new"})
        progress({"event": "eval", "token_loss": 2.5})
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["reading", "resumed after round 4"]
    assert lines[2].startswith("round 4/9  layers 0-1  ") and "loss" not in lines[2]
    assert lines[3].startswith("round 5/9  classifier  loss 0.2500  ")
    assert lines[4:] == ["eval  token loss 2.5000"]
    assert "\x1b" not in stream.getvalue()
    assert progress.summary() == "token loss 2.5000"


@pytest.mark.filterwarnings("default")
def test_on_a_terminal_a_bar_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    with RunProgress(budget_bytes=1 << 30, stream=stream) as progress:
        progress({"event": "phase", "name": "reading"})
        for number in range(3):
            progress({"event": "round", "round": number, "rounds": 3, "window": [0, 2], "loss": 0.25})
        progress({"event": "eval", "accuracy": 0.5})
    drawn = stream.getvalue()
    assert "layers 0-1  loss 0.2500" in drawn
    assert "3/3" in drawn
    assert "of 1.0 GiB" in drawn
    assert "accuracy 0.5000" in drawn


def test_bytes_are_reported_each_tenth_without_a_terminal() -> None:
    stream = io.StringIO()
    with byte_progress("convert", stream) as progress:
        for done in range(0, 1001, 5):
            progress("head", done, 1000)
        progress("nothing", 0, 0)
    assert len(stream.getvalue().splitlines()) == 11
    stream = Terminal()
    with byte_progress("convert", stream) as progress:
        progress("layer 3", 500, 1000)
    assert "layer 3" in stream.getvalue()
