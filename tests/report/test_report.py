"""The page about runs in every state: finished, unfinished, resumed, without evaluation, damaged, hostile."""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from chainfed_engine.cli.main import main
from chainfed_engine.errors import InvalidArgument, StorageError
from chainfed_engine.report import MAX_RUNS, read_run, render, write_report

Event = dict[str, Any]
MIB = 1 << 20
VOID = {"meta", "br", "hr", "img", "link", "input"}
HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>]]>\x00\x1b[31m‮"


def plan() -> Event:
    parts = {"interpreter with torch": 300 * MIB, "layers": 20 * MIB, "activations (window step)": 90 * MIB}
    total = sum(parts.values())
    return {"event": "plan", "round": -1, "predicted_peak_bytes": total, "budget": 512 * MIB, "parts": parts}


def profile() -> Event:
    event = {"event": "profile", "round": -1, "attempt": 0, "cka": [0.95, 0.9, 0.7, 0.5], "start_layer": 2}
    return {**event, "clients": ["anna"], "rejected": {}, "bytes_sent": 1000, "seconds": {"transport": 1.5}}


def exchange(index: int, *, rounds: int = 6, **changes: Any) -> Event:
    event = {"event": "round", "round": index, "rounds": rounds, "loss": 1.0 / (index + 1), "window": [2, 4]}
    event |= {"start_layer": 2, "accepted": True, "clients": ["anna", "ben"], "rejected": {}, "bytes_down": 5_000_000}
    event |= {"bytes_up": 1_000_000, "seconds": {"prepare": 1.0, "train": 2.0, "transport": 3.5, "server": 0.25}}
    return event | changes


def memory(index: int) -> Event:
    return {"event": "memory", "round": index, "peak_rss_bytes": 400 * MIB, "predicted_peak_bytes": 410 * MIB}


def evaluation(index: int, value: float) -> Event:
    return {"event": "eval", "round": index, "accuracy": value, "loss": 0.5}


def write_run(path: Path, events: Sequence[Event], config: str = '[train]\nmethod = "chain"\n', tail: str = "") -> Path:
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + tail, encoding="utf-8")
    (path / "config.toml").write_text(config, encoding="utf-8")
    return path


def whole_run(rounds: int = 6) -> list[Event]:
    events = [plan(), profile(), memory(-1)]
    for index in range(rounds):
        events += [exchange(index, rounds=rounds), memory(index), evaluation(index, 0.5 + index / 20)]
    return events


class Strict(HTMLParser):
    """Fails on tags that do not nest; keeps all tags and texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def checked(page: str) -> Strict:
    """The page parsed; it must run nothing and fetch nothing, and every picture must be XML."""
    parsed = Strict(page)
    assert not {"script", "iframe", "object", "embed", "link", "img", "base", "form"} & set(parsed.tags)
    for name, value in parsed.attributes:
        assert not name.startswith("on") and name not in ("src", "href", "srcset", "action"), name
        assert not (value or "").lower().startswith("javascript:")
    for at in range(page.count("<svg")):
        start = [index for index in range(len(page)) if page.startswith("<svg", index)][at]
        ElementTree.fromstring(page[start : page.index("</svg>", start) + 6])
    return parsed


def page_of(*runs: Path) -> tuple[str, list[str]]:
    page = render([read_run(run) for run in runs])
    return page, checked(page).texts


def test_a_whole_run_shows_every_plot_and_its_figures(tmp_path: Path) -> None:
    page, texts = page_of(write_run(tmp_path / "run", whole_run()))
    titles = ["Accuracy", "Training loss", "Memory by part", "Peak memory", "Position of the window"]
    titles += ["Where the chain starts", "Time by part", "Time of each round", "Bytes sent", "Who took part"]
    assert set(titles) <= set(texts)
    assert "0.7500" in texts and "6 of 6" in texts and "400.0 MiB" in texts and "512.0 MiB" in texts
    assert "budget 512.0 MiB" in texts and "start layer 2" in texts
    assert "round 3: layers 2 to 3" in texts
    assert "predicted, interpreter with torch: 300 MiB" in texts
    assert "interpreter with torch 300.0 MiB" in texts, "the legend has the sizes: small parts are slivers"
    assert "round 1, other: 0.5 seconds" in texts
    assert "prefers-color-scheme: dark" in page and "stroke-dasharray" in page


def test_a_budget_far_above_the_peak_does_not_squeeze_the_bars(tmp_path: Path) -> None:
    def width_of_bar(budget: int) -> tuple[float, list[str]]:
        events = [{**event, "budget": budget} if event["event"] == "plan" else event for event in whole_run()]
        page, texts = page_of(write_run(tmp_path / f"run-{budget}", events))
        bar = re.search(r'width="([0-9.]+)" height="[0-9.]+"><title>predicted, interpreter with torch', page)
        assert bar is not None
        return float(bar[1]), texts

    near, _ = width_of_bar(512 * MIB)
    far, texts = width_of_bar(64 * 1024 * MIB)
    assert far >= near
    assert "budget 64.0 GiB, beyond this scale →" in texts


def test_an_unfinished_run_without_evaluation_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [plan(), profile(), exchange(0), exchange(1)], tail='{"event": "round", "rou')
    page, texts = page_of(run)
    assert "Method chain. Unfinished: 2 of 6 rounds. No evaluation" in page
    assert "1 line(s) of metrics.jsonl could not be read" in page
    assert "Accuracy" not in texts


def test_a_resumed_run_counts_each_round_once(tmp_path: Path) -> None:
    events = [exchange(0), exchange(1, loss=9.0), {"event": "resume", "round": 0}, exchange(1, loss=0.5), exchange(2)]
    log = read_run(write_run(tmp_path / "run", events))
    assert sorted(log.rounds) == [0, 1, 2] and log.rounds[1].loss == 0.5
    assert log.notes == ["The run was taken up again after round 1."]


@pytest.mark.parametrize(
    "events",
    [
        [],
        [plan()],
        [evaluation(-1, 0.4)],
        [exchange(0, rounds=1, window=None, loss=None)],
        [exchange(0, rounds=1, bytes_down=0, bytes_up=0, seconds={}, clients=[])],
        [exchange(5, rounds=2**31 - 1), exchange(2**31 - 1, rounds=2**31 - 1)],
        whole_run(700),
    ],
    ids=["empty", "planned", "only evaluated", "probe", "nothing measured", "far apart", "many rounds"],
)
def test_runs_with_little_or_much_to_show_make_a_page(tmp_path: Path, events: list[Event]) -> None:
    page, _ = page_of(write_run(tmp_path / "run", events))
    assert len(page) < 2_000_000 and "nan" not in page.replace("nance", "")


def test_refused_updates_are_listed_with_their_reasons(tmp_path: Path) -> None:
    reasons = {"mallory": "not finite: adapters.3.up_weight holds NaN or infinity"}
    events = [exchange(0), exchange(1, rejected=reasons), exchange(2, accepted=False, clients=[], rejected=reasons)]
    _, texts = page_of(write_run(tmp_path / "run", events))
    assert "3 clients were asked, 1 had updates refused" in texts
    assert texts.count(reasons["mallory"]) == 1
    assert f"mallory, round 2: refused, {reasons['mallory']}" in texts
    assert "round 3: layers 2 to 3, no usable update" in texts


def test_clients_that_did_not_answer_are_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [exchange(0, silent=["carl"]), exchange(1, silent=["carl", HOSTILE])])
    _, texts = page_of(run)
    assert "carl, round 2: no answer in time" in texts and "4 clients were asked, 0 had updates refused" in texts


def test_hostile_text_is_shown_and_never_run(tmp_path: Path) -> None:
    events = [exchange(0, clients=[HOSTILE, "ben"], rejected={HOSTILE + "2": HOSTILE}, seconds={HOSTILE: 1.0})]
    events = [{**plan(), "parts": {HOSTILE: 5}}, profile(), *events, evaluation(0, 0.5)]
    config = f'[train]\nmethod = {json.dumps(HOSTILE)}\n["<b>"]\n"<i>" = "</table><script>"\n'
    run = write_run(tmp_path / "a<script>b", events, config)
    page, texts = page_of(run)
    assert any("<script>alert(1)</script>" in text for text in texts)
    assert not any(character in page for character in "\x00\x1b‮")
    checked(render([read_run(run), read_run(run, "other")]))


WRONG: list[Any] = [None, True, -1, 1e308, 10**400, "5", "<b>", [], [[]], {}, {"a": {"b": []}}, [None, 3], float("nan")]


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_a_field_of_the_wrong_type_is_left_out(tmp_path: Path, value: Any) -> None:
    events = []
    for event in (plan(), profile(), exchange(0), memory(0), evaluation(0, 0.5)):
        events += [{**event, key: value} for key in event if key != "event"]
        events.append(dict.fromkeys(event, value) | {"event": event["event"]})
    page_of(write_run(tmp_path / "run", [*events, exchange(3, rounds=6)]))


def test_lines_that_are_no_events_are_counted_and_passed_over(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [exchange(0)])
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"[]\n" + b"\xff\xfe\n" + b"[" * 200_000 + b"\n" + b'{"event": 5}\n' + b" " * (9 << 20) + b"x\n\n")
        file.write(json.dumps(exchange(1)).encode() + b"\n")
    log = read_run(run)
    assert sorted(log.rounds) == [0, 1]
    assert log.notes[0].startswith("4 line(s)") or log.notes[0].startswith("5 line(s)")


def test_several_runs_are_compared(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a" / "run", whole_run())
    second = write_run(tmp_path / "b" / "run", [*whole_run(3), exchange(3)], '[train]\nmethod = "full-adapters"\n')
    out = write_report([first, second], tmp_path / "page.html")
    texts = checked(out.read_text(encoding="utf-8")).texts
    assert "2 runs compared" in texts and "a/run" in texts and "b/run" in texts
    assert "What differs in the configurations" in texts and "[train] method" in texts
    same = write_report([first, first], tmp_path / "same.html").read_text(encoding="utf-8")
    assert "a/run (1)" in same and "What differs" not in same


def test_the_command_writes_into_the_run_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", whole_run())
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    checked((run / "report.html").read_text(encoding="utf-8"))
    assert main(["report", str(tmp_path)]) == 2
    assert "expected the directory of a run" in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(tmp_path / "no" / "folder.html")]) == 2


def test_no_run_or_too_many_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=f"1 to {MAX_RUNS}"):
        write_report([])
    with pytest.raises(InvalidArgument, match=f"1 to {MAX_RUNS}"):
        write_report([tmp_path] * (MAX_RUNS + 1))
    with pytest.raises(StorageError, match=r"no metrics\.jsonl"):
        write_report([tmp_path / "missing"])


def test_rounds_for_the_classifier_alone_are_explained(tmp_path: Path) -> None:
    sentence = "Rounds without a box trained the classifier alone."
    probed = [plan(), profile(), exchange(0, window=[4, 4]), exchange(1), exchange(2)]
    assert sentence in " ".join(page_of(write_run(tmp_path / "probed", probed))[1])
    assert sentence not in " ".join(page_of(write_run(tmp_path / "trained", whole_run()))[1])
