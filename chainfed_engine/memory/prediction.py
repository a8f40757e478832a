"""The predicted peak of given choices, part by part: the largest phase (`parts.py`) on top of what is always there."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from chainfed_engine.config import ChainConfig
from chainfed_engine.memory.device import parts_on_device
from chainfed_engine.memory.parts import (
    BATCH_TOKEN_BYTES,
    F32,
    HEAP_BYTES,
    WORKING_BYTES,
    Choices,
    Request,
    adapter_floats,
    classifier_bytes,
    fill_bytes,
    keeps_deep_graphs,
    step_bytes,
)
from chainfed_engine.memory.stand_ins import profile_bytes, solve_bytes, statistics_bytes
from chainfed_engine.sizes import format_size

START_UP = "start-up, beyond all of this"  # the part that is there where start-up took more than the run will
# Of what a step holds: what blocks of ever other sizes, kept in one heap, leave unused (0.3 to 0.8 measured, 0.6 to
# 1.05 with the activations of many layers; trimmed beyond it).
_KEPT_HOLES, _DEEP_KEPT_HOLES = 0.6, 1.1
_KEPT_GROWTH = 1.1  # a step may grow a kept heap before it is trimmed (1.83 of a step, once in five runs of one plan)


@dataclass(frozen=True)
class Plan:
    """`predicted_peak_bytes` of resident memory; `parts` add up to it; `choices` are what the run will use.

    `reasons`: why each choice is as it is, by its name. `advice`: another method that would serve better within the
    same budget, if there is one. For a run on a CUDA device with memory of its own the peak is
    that memory's, and `facts` hold `predicted_host_bytes` beside it.
    """

    predicted_peak_bytes: int
    parts: Mapping[str, int]
    choices: Choices
    budget: int | None
    facts: Mapping[str, Any] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    smallest_budget_bytes: int = 0
    advice: str | None = None

    def recorded_in(self, config: ChainConfig) -> ChainConfig:
        """`config` with what was "auto" as it was chosen."""
        choices = self.choices
        rows = choices.stand_in_rows or config.stand_in_rows
        return replace(config, window=choices.window, cache_format=choices.cache_format, stand_in_rows=rows)

    def to_json(self) -> dict[str, Any]:
        return {
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "budget": self.budget,
            "smallest_budget_bytes": self.smallest_budget_bytes,
            "parts": dict(self.parts),
            "choices": dict(vars(self.choices)),
            "reasons": dict(self.reasons),
            "advice": self.advice,
            **self.facts,
        }

    def table(self) -> str:
        rows = dict(self.parts) | {"predicted peak": self.predicted_peak_bytes}
        if self.budget is not None:
            rows["budget"] = self.budget
        if self.smallest_budget_bytes:
            rows["smallest budget that would do"] = self.smallest_budget_bytes
        width = max(len(name) for name in rows)
        lines = [f"{name:<{width}}  {format_size(size):>12}" for name, size in rows.items()]
        for name, value in vars(self.choices).items():
            lines.append(f"{name}: {value}" + (f" ({self.reasons[name]})" if name in self.reasons else ""))
        if self.advice is not None:
            lines.append(f"advice: {self.advice}")
        return "\n".join(lines)


def predict(request: Request, choices: Choices) -> Plan:
    """Predicted peak of the given choices."""
    parts = {"interpreter with torch": request.interpreter_bytes, **_weights(request, choices)}
    parts["adapters and optimizer"] = _adapter_bytes(request)
    parts["stand-ins"] = statistics_bytes(request, choices)
    phases = {
        "window step": step_bytes(request, choices),
        "prefix fill": fill_bytes(request, choices),
        "profile": profile_bytes(request, choices),
        "fitting stand-ins": solve_bytes(request, choices),
        "fitting the classifier": classifier_bytes(request, choices),
    }
    highest = max(phases, key=lambda name: phases[name])
    parts[f"largest phase ({highest})"] = phases[highest]
    parts["data"] = request.data_bytes or BATCH_TOKEN_BYTES * request.batch_tokens
    parts["libraries at work"] = WORKING_BYTES
    parts["heap"] = HEAP_BYTES
    if choices.kept_heap_bytes:
        growth = 1.0 if keeps_deep_graphs(request.config, choices.window) else _KEPT_GROWTH
        parts["heap kept for the next step"] = max(0, int(growth * choices.kept_heap_bytes) - phases[highest])
    facts: dict[str, Any] = {}
    if request.device is not None:
        parts, host_bytes = parts_on_device(request, choices, parts)
        host_bytes = 0 if request.device.is_unified else max(host_bytes, request.startup_bytes)
        facts = {"device": request.device.name, "predicted_host_bytes": host_bytes}
    beyond = request.startup_bytes - sum(parts.values())
    if beyond > 0 and (request.device is None or request.device.is_unified):
        parts[START_UP] = beyond
    return Plan(sum(parts.values()), parts, choices, request.config.budget_bytes, facts)


def with_kept_heap(request: Request, plan: Plan) -> Plan:
    """The plan whose steps leave freed blocks in the heap for the next: faster than giving them back."""
    is_deep = keeps_deep_graphs(request.config, plan.choices.window)
    holes = _DEEP_KEPT_HOLES if is_deep else _KEPT_HOLES
    kept_bytes = int((1 + holes) * step_bytes(request, plan.choices))
    return predict(request, replace(plan.choices, kept_heap_bytes=kept_bytes))


def _weights(request: Request, choices: Choices) -> dict[str, int]:
    sizes = request.sizes
    if choices.num_slots is None and request.device is not None and request.device.is_unified:
        # Pinned slots keep their size, that of the largest file.
        slots = (sizes.num_layers + sizes.num_head_shards) * sizes.slot_bytes
        return {"layer slots": slots, "embedding": sizes.embedding_bytes}
    if choices.num_slots is None:
        return {"layers": sizes.layer_bytes, "head": sizes.head_bytes, "embedding": sizes.embedding_bytes}
    return {"layer slots": choices.num_slots * sizes.slot_bytes}


def _adapter_bytes(request: Request) -> int:
    shape, config = request.shape, request.config
    one = adapter_floats(request)
    trained = request.window_layers * one
    held = shape.num_layers * one * 2  # the modules', and the federation's arrays
    if config.update_format != "f32":  # what is sent in eight bits, and one client's values of it
        held += shape.num_layers * one * 21 // 16
    if config.method == "flora":  # the sum of products beside every projection, there and here, and old and new
        attention, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        held += 4 * shape.num_layers * shape.hidden_size * (attention + keys)
    updates = config.clients_per_round * trained  # as they wait to be averaged
    return F32 * (held + 5 * trained + updates)
