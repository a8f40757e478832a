"""The lines of metrics.jsonl, made of what happened. In: summaries and measurements; out: flat JSON-able dicts.

Every event carries `round`: the number (from 0) of the round it belongs to or follows, -1 before the first.
`plan`: the first line of a run in one process, the predicted peak by part, the budget and what the planner chose.
`round`: `rounds` in all, loss, window, clients, bytes and seconds by part; `prefix_layers_run` and other costs are sums
over the counted clients; `rejected` says why by client, `silent` who did not answer, `late` how many answers to earlier
rounds came and were dropped; `epsilon`, of a private run, what it has spent so far. `profile`: CKA scores and start
layer. `memory`: peak figures after an exchange. `resume`: a run was taken up; `skipped_states` were damaged. `eval`:
scores of the whole model. Callbacks see three more that are never written: `phase` (`name`, `total`) and `step`
(`done`, `total`) of something long, and `end` (`error`: text or null).
"""

import math
from collections.abc import Mapping
from typing import Any

from chainfed_engine.memory.plan import Plan
from chainfed_engine.server import Summary

Event = dict[str, Any]
_SECONDS = "_seconds"


def exchange_event(
    summary: Summary,
    *,
    rounds: int,
    seconds: Mapping[str, float],
    cpu_seconds: float,
    epsilon: float | None = None,
) -> Event:
    """`round` or `profile`. `bytes_sent`: arrays carried, both ways; `seconds`: parts measured by clients (`prepare`,
    `train`; summed over them) and here (`transport`, which includes them, and `server`). `cpu_seconds`: of all threads
    of this process during the exchange."""
    totals = {name: value for name, value in summary.totals.items() if not name.endswith(_SECONDS)}
    parts = {name.removesuffix(_SECONDS): s for name, s in summary.totals.items() if name.endswith(_SECONDS)}
    if summary.kind == "profile":
        scores = list(summary.scores)
        event: Event = {"event": "profile", "round": summary.follows_round, "attempt": summary.index, "cka": scores}
    else:
        event = {"event": "round", "round": summary.index, "rounds": rounds, "loss": summary.loss}
        event |= {"typical_norm": summary.typical_norm}
        if epsilon is not None:
            event |= {"epsilon": epsilon}
    if summary.stage is not None:
        window = summary.stage.window
        event |= {"stage": summary.stage.kind, "window": [window.start, window.stop], "sweep": summary.stage.sweep}
    event |= {
        "start_layer": summary.start_layer,
        "accepted": summary.accepted,
        "clients": list(summary.clients),
        "rejected": dict(summary.rejected),
        "silent": list(summary.silent),
        "late": summary.num_late,
        "stale": dict(summary.stale),
        "bytes_sent": summary.bytes_down + summary.bytes_up,
        "bytes_down": summary.bytes_down,
        "bytes_up": summary.bytes_up,
        "seconds": {name: round(value, 6) for name, value in {**parts, **seconds}.items()},
        "cpu_seconds": round(cpu_seconds, 6),
    }
    # Clients name their metrics: none of theirs takes the place of what was seen here.
    return event | {name: value for name, value in totals.items() if name not in event}


def plan_event(plan: Plan) -> Event:
    """`plan`: `predicted_peak_bytes` and its `parts`, bytes by name; `budget` null where there is none; `choices`."""
    return {
        "event": "plan",
        "round": -1,
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "budget": plan.budget,
        "parts": dict(plan.parts),
        "choices": dict(vars(plan.choices)),
    }


def evaluation_event(round_id: int, metrics: Mapping[str, float]) -> Event:
    """`eval`: `accuracy` or `token_loss` of the whole model after `round`; null where it is not finite."""
    return {
        "event": "eval",
        "round": round_id,
        **{name: value if math.isfinite(value) else None for name, value in metrics.items()},
    }


def belongs_to_past(event: Event, *, round_id: int, profile_attempts: int) -> bool:
    """Whether a line was written before the saved state: `round_id` rounds, `profile_attempts` attempts done."""
    if event["event"] == "profile":
        return isinstance(event.get("attempt"), int) and event["attempt"] < profile_attempts
    return isinstance(event.get("round"), int) and event["round"] < round_id
