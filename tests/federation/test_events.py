import json

from chainfed_engine.federation.events import exchange_event
from chainfed_engine.server import Summary


def test_a_client_cannot_take_the_place_of_what_the_server_saw_by_naming_its_metrics() -> None:
    names = (
        "event",
        "round",
        "rounds",
        "clients",
        "rejected",
        "accepted",
        "bytes_up",
        "cpu_seconds",
        "loss",
        "seconds",
    )
    summary = Summary("round", 3, True, ("a",), {"b": "norm"}, 10, 20, totals=dict.fromkeys(names, 7.0), loss=0.5)
    event = exchange_event(summary, rounds=9, seconds={"server": 0.25}, cpu_seconds=1.0)
    honest = exchange_event(
        Summary("round", 3, True, ("a",), {"b": "norm"}, 10, 20, loss=0.5),
        rounds=9,
        seconds={"server": 0.25},
        cpu_seconds=1.0,
    )
    assert {name: event[name] for name in honest if name != "seconds"} == {
        name: value for name, value in honest.items() if name != "seconds"
    }
    assert event["seconds"]["server"] == 0.25 and json.loads(json.dumps(event)) == event
