"""Server and sites as they are deployed, but for the network: the same bits as in process, and what can go wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chainfed_engine import api
from chainfed_engine.config_file import load_config
from chainfed_engine.errors import ChainfedError
from chainfed_engine.federation import deployment
from chainfed_engine.federation.codec import pack, unpack
from chainfed_engine.federation.deployment import serve_rounds
from chainfed_engine.federation.transport_flower import FlowerTransport
from tests.federation.deployed import SITES, DirectCourier, make_files, site


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deployed")
    make_files(folder)
    api.run(load_config(folder / "all.toml"), folder / "in-process")
    return folder


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transport's clock is the courier's."""

    class Timed(FlowerTransport):
        def __init__(self, courier: Any, patience: Any) -> None:
            super().__init__(courier, patience, sleep=courier.sleep, now=lambda: courier.now)

        def ask(self, messages: Any, wait: Any) -> Any:
            wait._now, wait._started = self._now, self._now()
            return super().ask(messages, wait)

    monkeypatch.setattr(deployment, "FlowerTransport", Timed)


def _serve(
    root: Path,
    out: Path,
    courier: DirectCourier,
    *,
    resume: bool = False,
    sites: Any = SITES,
    config: str = "serve.toml",
) -> dict[str, Any]:
    serve_rounds(courier, config_path=str(root / config), out=str(out), sites=sites, resume=resume, meet_seconds=30)
    outcome: dict[str, Any] = json.loads((out / "outcome.json").read_text())
    return outcome


def _sites(root: Path, tmp_path: Path) -> list[Any]:
    shutil.rmtree(root / "sites", ignore_errors=True)
    return [site(root, name) for name in SITES]


def _rounds(out: Path) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "round"]


def test_a_deployed_run_ends_with_the_bits_of_the_run_in_process(root: Path, tmp_path: Path) -> None:
    courier = DirectCourier(_sites(root, tmp_path))
    outcome = _serve(root, tmp_path / "run", courier)
    assert outcome["status"] == "done", outcome
    assert [one.run_ended for one in courier.sites.values()] == ["it is done"] * len(SITES)
    for name in ("adapters.safetensors", "labels.json"):
        assert (tmp_path / "run" / name).read_bytes() == (root / "in-process" / name).read_bytes()
    for deployed, local in zip(_rounds(tmp_path / "run"), _rounds(root / "in-process"), strict=True):
        assert all(deployed[name] == local[name] for name in ("loss", "clients", "bytes_down", "bytes_up", "window"))


def test_a_deployed_run_in_thirty_two_bits_ends_with_the_bits_of_the_one_in_process(root: Path, tmp_path: Path) -> None:
    for name in ("all", "serve"):
        text = (root / f"{name}.toml").read_text().replace("[federation]", '[federation]\nupdate_format = "f32"')
        (root / f"{name}32.toml").write_text(text)
    local = api.run(load_config(root / "all32.toml"), tmp_path / "in-process").directory
    courier = DirectCourier(_sites(root, tmp_path))
    outcome = _serve(root, tmp_path / "run", courier, config="serve32.toml")
    assert outcome["status"] == "done", outcome
    assert (tmp_path / "run" / "adapters.safetensors").read_bytes() == (local / "adapters.safetensors").read_bytes()
    assert all(_bytes(local, way) == _bytes(tmp_path / "run", way) for way in ("up", "down"))
    for way in ("up", "down"):
        pairs = zip(_bytes(root / "in-process", way), _bytes(local, way), strict=True)
        assert any(eight < 0.5 * thirty_two for eight, thirty_two in pairs)


def _bytes(path: Path, way: str) -> list[int]:
    return [event[f"bytes_{way}"] for event in _rounds(path)]


def test_sites_that_are_restarted_between_rounds_keep_what_they_were_sent(root: Path, tmp_path: Path) -> None:
    sites = _sites(root, tmp_path)

    class Restarting(DirectCourier):
        def push(self, node_id: int, header: bytes, payload: bytes, *, ttl_seconds: float) -> str | None:
            name = list(self.registered)[node_id - 10]
            self.sites[name] = site(root, name)
            return super().push(node_id, header, payload, ttl_seconds=ttl_seconds)

    outcome = _serve(root, tmp_path / "run", Restarting(sites))
    assert outcome["status"] == "done", outcome
    assert (tmp_path / "run" / "adapters.safetensors").read_bytes() == (
        root / "in-process" / "adapters.safetensors"
    ).read_bytes()
    deployed, local = _rounds(tmp_path / "run"), _rounds(root / "in-process")
    assert [event["bytes_down"] for event in deployed] == [event["bytes_down"] for event in local]
    assert all(event["rejected"] == {} for event in deployed)


def test_a_server_that_was_killed_goes_on_and_sends_returning_sites_only_what_they_lack(
    root: Path, tmp_path: Path
) -> None:
    courier = DirectCourier(_sites(root, tmp_path))
    calls = 0

    class Killed(BaseException):
        pass

    def dies(name: str, count: int, header: bytes, payload: bytes) -> Any:
        nonlocal calls
        calls += "reply" in unpack(header, payload)[0]
        if calls == 6:  # after the profile pass and a round and a half
            raise Killed
        return header, payload

    courier._spoil = dies
    with pytest.raises(Killed):
        _serve(root, tmp_path / "run", courier)
    held = {name: {path.name for path in (root / "sites" / name).rglob("*.npy")} for name in SITES}
    again = DirectCourier([site(root, name) for name in SITES])
    outcome = _serve(root, tmp_path / "run", again, resume=True)
    assert outcome["status"] == "done", outcome
    assert (tmp_path / "run" / "adapters.safetensors").read_bytes() == (
        root / "in-process" / "adapters.safetensors"
    ).read_bytes()
    seen: set[str] = set()
    for name, header, payload in again.pushed:
        record, arrays = unpack(header, payload)
        if record["message"] == "task" and name not in seen:
            seen.add(name)
            needed = record["task"]["versions"]
            assert set(arrays) == {key for key in needed if f"{needed[key]}.{key}.npy" not in held[name]}, name
    assert any(held.values())


def _spoiling(change: Callable[[dict[str, Any], dict[str, np.ndarray]], Any]) -> Callable[..., Any]:
    """Answers of the hospital to training tasks, changed."""

    def spoil(name: str, count: int, header: bytes, payload: bytes) -> Any:
        record, arrays = unpack(header, payload)
        if name != "hospital" or record.get("message") != "reply" or record["reply"]["kind"] != "train":
            return header, payload
        return change(record, dict(arrays))

    return spoil


def _field(name: str, value: Any) -> Callable[..., Any]:
    return lambda record, arrays: pack({**record, "reply": {**record["reply"], name: value}}, arrays)


def _stage(record: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[bytes, bytes]:
    stage = {**record["reply"]["stage"], "start": 0, "stop": 1, "picked": None}
    return pack({**record, "reply": {**record["reply"], "stage": stage}}, arrays)


def _arrays(change: Callable[[np.ndarray], np.ndarray]) -> Callable[..., Any]:
    return lambda record, arrays: pack(record, {key: change(array) for key, array in arrays.items()})


def _cut(record: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[bytes, bytes]:
    header, payload = pack(record, arrays)
    return header, payload[: len(payload) // 2]


def _times(array: np.ndarray, factor: str) -> np.ndarray:
    """Scales times a factor; codes as they are."""
    return array * np.float32(factor) if array.dtype == np.float32 else array


HOSTILE: dict[str, tuple[Callable[..., Any], str]] = {
    "another model": (_field("base", "0" * 64), "frozen model"),
    "another window": (_stage, "expected the window"),
    "another round": (_field("round_id", 99), "expected round"),
    "another client's name": (_field("client", "practice"), "in the name of 'practice'"),
    "another shape": (_arrays(lambda array: np.zeros((2, 2), np.float32)), "expected codes in int8"),
    "another dtype": (_arrays(lambda array: array.astype(np.float64)), "float64"),
    "oversized": (_arrays(lambda array: np.zeros((4096, 64), array.dtype)), "expected codes in int8 of shape"),
    "NaN": (_arrays(lambda array: _times(array, "nan")), "not finite"),
    "scaled": (_arrays(lambda array: _times(array, "1e4")), "norm"),
    "truncated": (_cut, "cut short"),
    "hostile header": (lambda record, arrays: (b"[" * 50000, b""), "no JSON"),
    "another protocol": (lambda record, arrays: (b'{"protocol": 7}', b""), "expected protocol 4, got 7"),
    "a pickle": (lambda record, arrays: (b"\x80\x04cos\nsystem\n", b"x"), "no JSON"),
    "Flower's own error": (lambda record, arrays: "Flower error 2: handler raised", "handler raised"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_site_is_refused_with_a_reason_and_the_round_goes_on(root: Path, tmp_path: Path, what: str) -> None:
    change, reason = HOSTILE[what]
    # The norm of two clients cannot tell who is out of line; three can.
    text = (root / "serve.toml").read_text().replace("clients_per_round = 2", "clients_per_round = 3")
    text = text.replace("rounds = 3", "rounds = 1\nstand_in = false")
    (root / "serve3.toml").write_text(text)
    courier = DirectCourier(_sites(root, tmp_path), spoil=_spoiling(change))
    serve_rounds(
        courier,
        config_path=str(root / "serve3.toml"),
        out=str(tmp_path / "run"),
        sites=SITES,
        resume=False,
        meet_seconds=30,
    )
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["status"] == "done"
    for event in _rounds(tmp_path / "run"):
        assert event["clients"] == ["clinic", "practice"], event
        assert reason in event["rejected"]["hospital"]


def test_a_site_that_is_silent_is_named_and_the_round_goes_on_without_it(root: Path, tmp_path: Path) -> None:
    silent = _spoiling(lambda record, arrays: None)
    outcome = _serve(root, tmp_path / "run", DirectCourier(_sites(root, tmp_path), spoil=silent))
    assert outcome["status"] == "done", outcome
    with_it = [event for event in _rounds(tmp_path / "run") if "hospital" in event["silent"]]
    assert with_it and all(
        event["accepted"] and event["clients"] and "hospital" not in event["clients"] for event in with_it
    )


def test_a_task_that_got_lost_is_sent_again_and_the_bits_are_those_of_a_calm_run(root: Path, tmp_path: Path) -> None:
    lost = 0

    def lose(name: str, count: int, header: bytes, payload: bytes) -> Any:
        nonlocal lost
        if name == "hospital" and unpack(header, payload)[0].get("message") == "reply" and lost < 3:
            lost += 1
            return "lost: node unavailable"
        return header, payload

    outcome = _serve(root, tmp_path / "run", DirectCourier(_sites(root, tmp_path), spoil=lose))
    assert outcome["status"] == "done" and lost == 3
    assert (tmp_path / "run" / "adapters.safetensors").read_bytes() == (
        root / "in-process" / "adapters.safetensors"
    ).read_bytes()
    assert not any(event["rejected"] or event["silent"] for event in _rounds(tmp_path / "run"))


def test_a_site_whose_processes_always_die_is_given_up_in_every_exchange(root: Path, tmp_path: Path) -> None:
    def dies(name: str, count: int, header: bytes, payload: bytes) -> Any:
        reply = unpack(header, payload)[0].get("message") == "reply"
        return "lost: the process died" if name == "hospital" and reply else (header, payload)

    outcome = _serve(root, tmp_path / "run", DirectCourier(_sites(root, tmp_path), spoil=dies))
    assert outcome["status"] == "done"
    with_it = [event for event in _rounds(tmp_path / "run") if "hospital" in event["rejected"]]
    assert with_it and all("process died" in event["rejected"]["hospital"] for event in with_it)


def test_a_site_restarted_in_the_middle_of_an_exchange_is_sent_its_task_again(root: Path, tmp_path: Path) -> None:
    lost: list[str] = []

    def once(name: str, count: int, header: bytes, payload: bytes) -> Any:
        record, _ = unpack(header, payload)
        if not lost and name == "hospital" and record.get("message") == "reply" and record["reply"]["kind"] == "train":
            lost.append(name)
            courier.activations[name] += 1
            return None
        return header, payload

    courier = DirectCourier(_sites(root, tmp_path), spoil=once)
    outcome = _serve(root, tmp_path / "run", courier)
    assert outcome["status"] == "done" and lost
    assert (tmp_path / "run" / "adapters.safetensors").read_bytes() == (
        root / "in-process" / "adapters.safetensors"
    ).read_bytes()


def _refused(root: Path, tmp_path: Path, change: dict[str, Any]) -> str:
    def spoil(name: str, count: int, header: bytes, payload: bytes) -> Any:
        record, arrays = unpack(header, payload)
        return pack({**record, **(change if name == "hospital" and record["message"] == "hello" else {})}, arrays)

    courier = DirectCourier(_sites(root, tmp_path), spoil=spoil)
    outcome = _serve(root, tmp_path / "run", courier)
    assert all(str(one.run_ended).startswith("it failed: site hospital: ") for one in courier.sites.values())
    assert outcome["status"] == "failed" and not (tmp_path / "run" / "state").exists()
    return str(outcome["error"])


def test_a_site_of_another_version_model_task_or_name_stops_the_run_before_it_starts(
    root: Path, tmp_path: Path
) -> None:
    assert "hospital: expected chainfed-engine" in _refused(root, tmp_path / "a", {"version": "0.0.1"})
    assert "convert the same checkpoint" in _refused(root, tmp_path / "b", {"base": "f" * 64})
    assert "expected classification data" in _refused(root, tmp_path / "c", {"task": "causal-lm"})
    assert "calls itself" in _refused(root, tmp_path / "d", {"site": "practice"})
    assert "labels" in _refused(root, tmp_path / "e", {"labels": [1, 2]})


def test_sites_that_do_not_come_are_named(root: Path, tmp_path: Path) -> None:
    courier = DirectCourier(_sites(root, tmp_path)[:2])
    outcome = _serve(root, tmp_path / "run", courier)
    assert outcome["status"] == "failed" and "no answer of practice within 30 seconds" in outcome["error"]


def test_a_run_without_a_deadline_is_not_deployed(root: Path, tmp_path: Path) -> None:
    text = (root / "serve.toml").read_text().replace("deadline_seconds = 60.0", "deadline_seconds = 0")
    with pytest.raises(ChainfedError, match="needs a deadline"):
        (root / "endless.toml").write_text(text)
        deployment.check_deployable(load_config(root / "endless.toml"))


def test_nothing_of_a_site_is_readable_by_others(root: Path, tmp_path: Path) -> None:
    _serve(root, tmp_path / "run", DirectCourier(_sites(root, tmp_path)))
    paths = [*(root / "sites").rglob("*"), tmp_path / "run", *(tmp_path / "run").rglob("*")]
    assert [path for path in paths if path.stat().st_mode & 0o077] == []
    assert any(path.name.endswith(".npy") for path in paths) and any(path.suffix == ".bin" for path in paths)
