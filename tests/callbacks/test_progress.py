import io

import pytest

from chainfed_engine.callbacks import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_every_event_is_a_plain_line() -> None:
    stream = io.StringIO()
    with Progress(budget_bytes=1 << 30, stream=stream) as progress:
        progress({"event": "phase", "name": "reading"})
        progress({"event": "resume", "round": 3, "skipped_states": []})
        progress({"event": "profile", "start_layer": None})
        progress({"event": "round", "round": 3, "rounds": 9, "window": [0, 2], "loss": None})
        progress({"event": "round", "round": 4, "rounds": 9, "window": [6, 6], "loss": 0.25, "more": object()})
        progress({"event": "something new"})
        progress({"event": "eval", "token_loss": 2.5})
        progress({"event": "end", "error": None})
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
    with Progress(budget_bytes=1 << 30, stream=stream) as progress:
        progress({"event": "phase", "name": "reading"})
        for number in range(3):
            progress({"event": "round", "round": number, "rounds": 3, "window": [0, 2], "loss": 0.25})
        progress({"event": "eval", "accuracy": 0.5})
    drawn = stream.getvalue()
    assert "layers 0-1" in drawn and "loss 0.2500" in drawn
    assert "3/3" in drawn
    assert "/1.0 GiB" in drawn
    assert "accuracy 0.5000" in drawn


def event_of(kind: str, number: int, **more: object) -> dict[str, object]:
    return {"event": kind, "round": number, "rounds": 10, "window": [2, 4], **more}


def test_a_round_moves_with_its_clients_and_the_time_left_counts_from_where_the_run_was_taken_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr("chainfed_engine.callbacks.progress.time.monotonic", lambda: now[0])
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    with Progress(stream=stream) as progress:
        progress({"event": "plan", "budget": 1 << 40})
        progress({"event": "resume", "round": 5})
        progress(event_of("phase", 6, name="train", total=4))
        now[0] += 10
        progress({"event": "step", "done": 2, "total": 4})
        now[0] += 10
        progress(event_of("round", 6, loss=0.5))
        progress(event_of("phase", 6, name="evaluate", total=None, window=None))
        progress({"event": "end", "error": None})
    drawn = stream.getvalue()
    assert "client 2/4" in drawn and "6/10" in drawn and "7/10" in drawn
    assert "0:01:10 left" in drawn  # half a round in 10 s: 3.5 rounds to go
    assert "0:01:00 left" in drawn  # one round in 20 s: 3 to go
    assert "/1.0 TiB" in drawn and "evaluate" in drawn


def test_on_a_narrow_terminal_one_line_keeps_all_figures_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    now = [100.0]
    monkeypatch.setattr("chainfed_engine.callbacks.progress.time.monotonic", lambda: now[0])
    stream = Terminal()
    with Progress(budget_bytes=1 << 40, stream=stream) as progress:
        for number in range(98, 100):
            train = {"event": "phase", "name": "train", "round": number, "rounds": 120, "window": [128, 130]}
            progress({**train, "total": 100})
            for done in (1, 99):
                now[0] += 1800
                progress({"event": "step", "done": done, "total": 100})
            progress({"event": "round", "round": number, "rounds": 120, "window": [128, 130], "loss": 10.25})
        progress({"event": "end", "error": None})
    drawn = stream.getvalue()
    assert "\x1b[1A" not in drawn, "more than one line"
    for whole in ("99/120", "loss 10.2500", " left", "/1.0 TiB", "layers 1", "…", "done"):
        assert whole in drawn


def test_memory_above_the_budget_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    with Progress(budget_bytes=1 << 20, stream=stream) as progress:
        progress(event_of("round", 0, loss=0.5))
    assert "\x1b[1;31m" in stream.getvalue()


def test_plain_lines_tell_the_time_left() -> None:
    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        for number in range(2):
            progress(event_of("phase", number, name="train", total=2))
            progress({"event": "step", "done": 1, "total": 2})
            progress(event_of("round", number, loss=0.5))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and all(line.endswith(" left") for line in lines)
