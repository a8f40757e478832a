"""The planner: predicted peak memory part by part, before anything is allocated, and the choices that keep to a budget.

The peak is the largest phase (`parts.py`) on top of what is always there. Candidates are ordered by an estimate of
their seconds a step; the fastest that fits is taken and says why each choice is as it is. What the user fixed (batch,
sequence length, a window) is never changed; a window left open is as wide as costs no speed.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from chainfed_engine.config import ChainConfig
from chainfed_engine.errors import MemoryBudgetExceeded
from chainfed_engine.memory.device import parts_on_device
from chainfed_engine.memory.parts import (
    BATCH_TOKEN_BYTES,
    F32,
    HEAP_BYTES,
    MIB,
    WORKING_BYTES,
    Choices,
    DataFacts,
    Request,
    StoreSizes,
    adapter_floats,
    branches,
    classifier_bytes,
    fill_bytes,
    keeps_deep_graphs,
    profile_bytes,
    saved_floats,
    solve_bytes,
    stand_in_row_counts,
    statistics_bytes,
    step_bytes,
)
from chainfed_engine.sizes import format_size

__all__ = [
    "Choices",
    "DataFacts",
    "Plan",
    "Request",
    "StoreSizes",
    "make_plan",
    "predict",
    "saved_floats",
    "smallest_plan",
    "what_would_shrink",
]

STREAMED_FILL_BYTES = (64 * MIB, 16 * MIB, 4 * MIB)  # read each layer once for as many batches as this holds
RESIDENT_FILL_BYTES = (4 * MIB,)  # nothing is read again: small chunks stay in the processor's caches
# Nominal rates for ordering candidates; a run's figures differ, their order seldom does.
_FLOPS_A_SECOND, _BYTES_A_SECOND = 150e9, 1.5e9
_HALVED_ROWS = 1.25  # a stand-in fitted on half the rows must make the step faster by more than this
_SLID_WINDOW = 2  # a window of no more layers than this may be slow; wider ones must not be
_START_UP = "start-up, beyond all of this"  # the part that is there where start-up took more than the run will
_TOKENS_AT_HALF_SPEED = 40  # in one product
_PADDING = 0.7  # of a random batch, relative to that of samples of mean length beside the longest of all
_FULL_SPEED_TOKENS = 256  # in one product: 384 are 4 % slower than 768, 192 17 % (SmolLM2, docs/LOG.md)
# Of what a step holds: what blocks of ever other sizes, kept in one heap, leave unused (0.3 to 0.8 measured, 0.6 to 1.0
# with the activations of many layers; trimmed beyond it).
_KEPT_HOLES, _DEEP_KEPT_HOLES = 0.6, 1.0
_KEPT_GROWTH = 1.1  # a step may grow a kept heap before it is trimmed (1.83 of a step, once in five runs of one plan)
_LEAST_KEPT_STEP = 24 * MIB  # the blocks of smaller ones stay in a lean heap too
# Of a step whose freed blocks go back at once: 1.1 to 1.6 measured, and 1.4 to 1.8 where it keeps the activations of
# many layers, for then smaller blocks are mapped alone as well (docs/LOG.md).
_LEAN_SLOWDOWN, _DEEP_LEAN_SLOWDOWN = 1.3, 1.6
_FREE_SLOTS = 2  # beside pinned window layers: one in use, one being read


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


def make_plan(request: Request) -> Plan:
    """The choices within the budget. A window left to "auto" is the widest that slows no step down; all else is what is
    fastest. Raises MemoryBudgetExceeded naming the smallest budget that would do."""
    chosen, smallest = _chosen(request), smallest_plan(request)
    if chosen is not None:
        return replace(chosen, smallest_budget_bytes=smallest.predicted_peak_bytes, advice=_advice(request, chosen))
    budget = request.config.budget_bytes
    assert budget is not None
    if _START_UP in smallest.parts:
        size = format_size(request.startup_bytes)
        raise MemoryBudgetExceeded(
            f"budget {format_size(budget)}: the smallest that would do is {request.startup_bytes} bytes ({size}), for "
            "to import PyTorch and read the data took that before a model was opened; raise [memory] budget or, "
            "without a GPU, install PyTorch's CPU build, which takes less"
        )
    largest = max(smallest.parts, key=lambda name: smallest.parts[name])
    savings = what_would_shrink(request)
    raise MemoryBudgetExceeded(
        f"budget {format_size(budget)}: the smallest that would do is "
        f"{smallest.predicted_peak_bytes} bytes ({format_size(smallest.predicted_peak_bytes)}; {largest} takes "
        f"{format_size(smallest.parts[largest])}); raise [memory] budget"
        + ("" if not savings else f" or shrink it: {'; '.join(savings)}")
    )


def _chosen(request: Request) -> Plan | None:
    """The plan to run, None if none fits."""
    if not _is_window_open(request):
        return _fastest(request)
    widest = request.window
    for window in range(widest, 0, -1):
        plan = _fastest(_with_window(request, window), at_full_speed=window > _SLID_WINDOW)
        if plan is None:
            continue
        reason = "wider ones learn more; no wider than two thirds of an encoder's layers, half of a causal LM's"
        if window < widest:
            reason = f"wider ones learn more, but up to {widest} layers do not fit without slowing steps down"
        return replace(plan, reasons={**plan.reasons, "window": reason})
    return None


def _is_window_open(request: Request) -> bool:
    return request.config.window is None and request.config.method in ("chain", "top-window")


def _with_window(request: Request, window: int) -> Request:
    return replace(request, config=replace(request.config, window=window))


def _at_full_speed(request: Request, choices: Choices) -> bool:
    """Whether a step runs no layer twice, keeps the window's layers and takes parts that are no slower than the batch:
    what large products gain in speed is no more than what parts of like lengths save in padding."""
    stays = choices.num_slots is None or choices.num_slots >= choices.window + _FREE_SLOTS
    is_large = request.part_tokens(choices) >= min(request.batch_tokens, _FULL_SPEED_TOKENS)
    return stays and not choices.recompute and is_large


def _fastest(request: Request, *, at_full_speed: bool = False) -> Plan | None:
    """The fastest choices within the budget for a given window, None if none fit."""
    budget = request.config.budget_bytes
    candidates = [each for each in _candidates(request) if not at_full_speed or _at_full_speed(request, each)]
    lean = _DEEP_LEAN_SLOWDOWN if keeps_deep_graphs(request.config, request.window) else _LEAN_SLOWDOWN
    ordered: list[tuple[float, bool, Choices]] = []
    for choices in candidates:
        cost = _cost(request, choices)
        may_keep = request.device is None and step_bytes(request, choices) >= _LEAST_KEPT_STEP
        ordered.append((cost * lean if may_keep else cost, False, choices))
        ordered += [(cost, True, choices)] * may_keep
    for _, keeps_heap, choices in sorted(ordered, key=lambda each: each[0]):
        plan = predict(request, choices)
        if keeps_heap:
            plan = _with_kept_heap(request, plan)
        if budget is None or plan.predicted_peak_bytes <= budget:
            return replace(plan, reasons=_reasons(request, plan))
    return None


def _with_kept_heap(request: Request, plan: Plan) -> Plan:
    """The plan whose steps leave freed blocks in the heap for the next: faster than giving them back."""
    holes = _DEEP_KEPT_HOLES if keeps_deep_graphs(request.config, plan.choices.window) else _KEPT_HOLES
    kept_bytes = int((1 + holes) * step_bytes(request, plan.choices))
    return predict(request, replace(plan.choices, kept_heap_bytes=kept_bytes))


def _advice(request: Request, chosen: Plan) -> str | None:
    """Causal LMs learn more from LoRA in all layers than from a chain of few of them in the same time, where it fits;
    from half of the layers they learn as much (measured: docs/RESULTS.md)."""
    if request.task != "causal-lm" or request.config.method != "chain":
        return None
    if 2 * chosen.choices.window >= request.shape.num_layers:
        return None
    try:
        plan = make_plan(replace(request, config=replace(request.config, method="lora")))
    except MemoryBudgetExceeded:
        return None
    return (
        f'[train] method = "lora" fits too, at {format_size(plan.predicted_peak_bytes)}: a causal LM learned more from '
        f"it in the same time than from a window of {chosen.choices.window} (docs/RESULTS.md)"
    )


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
        parts[_START_UP] = beyond
    return Plan(sum(parts.values()), parts, choices, request.config.budget_bytes, facts)


def _cost(request: Request, choices: Choices) -> float:
    """What candidates are ordered by: seconds a step, and what fewer rows for the stand-ins are worth."""
    halvings = math.log2(stand_in_row_counts(request)[0] / choices.stand_in_rows) if choices.stand_in_rows else 0.0
    return step_seconds(request, choices) * math.pow(_HALVED_ROWS, halvings)


def step_seconds(request: Request, choices: Choices) -> float:
    """Nominal time of one optimizer step and its share of the prefix, for ordering candidates."""
    shape, config, layers = request.shape, request.config, max(request.window_layers, 1)
    weights = request.sizes.layer_bytes / max(request.sizes.num_layers, 1)
    flops = request.batch_tokens * layers * weights * 2 * (4 + int(choices.recompute))
    rows = config.batch_size * request.targets * branches(request) if request.task == "causal-lm" else 0
    flops += 4.0 * rows * shape.hidden_size * shape.vocab_size
    parts = -(-config.batch_size // choices.micro_batch)
    # Parts of like lengths are padded less; smaller products are slower; every part pays its calls.
    mean = min(request.facts.mean_tokens or request.tokens, request.tokens)
    flops *= 1 - _PADDING * (1 - mean / request.tokens) * (1 - 1 / parts)
    flops *= 1 + _TOKENS_AT_HALF_SPEED / (request.part_samples(choices) * mean)
    overhead = 0.01 * parts
    read = 0.0
    if choices.num_slots is not None:
        pinned = choices.num_slots >= layers + _FREE_SLOTS
        read += parts * (request.sizes.head_bytes * (rows > 0) + (0 if pinned else 2 * layers * weights))
        tokens_held = max(choices.fill_bytes / (F32 * shape.hidden_size), request.batch_tokens)
        read += request.sizes.layer_bytes * request.batch_tokens / tokens_held
        if choices.num_slots == 1:  # nothing is read ahead
            return (flops / _FLOPS_A_SECOND + read / _BYTES_A_SECOND) + overhead
    return max(flops / _FLOPS_A_SECOND, read / _BYTES_A_SECOND) + overhead + 0.1 * read / _BYTES_A_SECOND


def smallest_plan(request: Request) -> Plan:
    """The leanest choices, whatever the budget; of a window left open, as narrow as that takes."""
    narrow = (1, min(_SLID_WINDOW, request.window))
    tried = [_with_window(request, window) for window in narrow] if _is_window_open(request) else [request]
    plans = (predict(one, choices) for one in tried for choices in _candidates(one))
    return min(plans, key=lambda plan: plan.predicted_peak_bytes)


def what_would_shrink(request: Request) -> list[str]:
    """What the user could change and how many bytes less the leanest choices would then take, largest first."""
    config, now = request.config, smallest_plan(request).predicted_peak_bytes
    trials: dict[str, dict[str, Any]] = {
        "[train] sequence_length": {"sequence_length": max(2, config.sequence_length // 2)},
        "[train] batch_size": {"batch_size": max(1, config.batch_size // 2)},
        "[chain] window": {"window": max(1, request.window // 2)},
        "[chain] adapter_size": {"adapter_size": max(1, config.adapter_size // 2)},
        "[chain] stand_in": {"stand_in": False},
    }
    if config.stand_in_rows is not None:
        trials["[chain] stand_in_rows"] = {"stand_in_rows": max(16, config.stand_in_rows // 2)}
    saved: list[tuple[int, str]] = []
    for name, change in trials.items():
        less = now - smallest_plan(replace(request, config=replace(config, **change))).predicted_peak_bytes
        value = next(iter(change.values()))
        if less >= MIB and getattr(config, next(iter(change))) != value:
            saved.append((less, f"{name} = {str(value).lower()} saves {format_size(less)}"))
    return [text for _, text in sorted(saved, reverse=True)]


def _candidates(request: Request) -> Iterator[Choices]:
    config, sizes = request.config, request.sizes
    cache_format: Literal["int8", "bf16", "f32"] = "int8" if config.cache_format == "auto" else config.cache_format
    micro_batches = [config.batch_size]
    while micro_batches[-1] > 1:
        micro_batches.append((micro_batches[-1] + 1) // 2)
    slots: list[int | None] = [None]
    wanted = (request.window_layers + _FREE_SLOTS, 3, 2, 1)
    slots += [count for count in dict.fromkeys(wanted) if count < sizes.num_layers + sizes.num_head_shards]
    for num_slots in slots:
        for recompute in (False, True) if request.window_layers > 1 else (False,):
            for micro_batch in micro_batches:
                for held in RESIDENT_FILL_BYTES if num_slots is None else STREAMED_FILL_BYTES:
                    for rows in stand_in_row_counts(request):
                        yield Choices(request.window, num_slots, micro_batch, recompute, cache_format, held, rows)


def _reasons(request: Request, chosen: Plan) -> dict[str, str]:
    """Why each choice is as it is: for what was given up, the peak that the alternative would have had."""
    choices = chosen.choices

    def peak_with(**change: Any) -> str:
        other = replace(choices, kept_heap_bytes=0, **change)
        if other.num_slots is None:
            other = replace(other, fill_bytes=RESIDENT_FILL_BYTES[0])
        return format_size(predict(request, other).predicted_peak_bytes)

    reasons = {
        "cache_format": "the smallest; its error is below that of the 4-bit layers"
        if request.config.cache_format == "auto"
        else "as given in [memory] cache_format"
    }
    if choices.num_slots is None:
        reasons["num_slots"] = "all layers and the head stay in memory: they fit"
    else:
        pinned = choices.num_slots >= request.window_layers + _FREE_SLOTS
        kept = "the window's stay, two more stream" if pinned else "all stream"
        kept = "each is read when it is needed" if choices.num_slots == 1 else kept
        reasons["num_slots"] = f"{kept}; all in memory would peak at {peak_with(num_slots=None)}"
    if choices.micro_batch < (whole := request.config.batch_size):
        larger = peak_with(micro_batch=min(whole, 2 * choices.micro_batch))
        reasons["micro_batch"] = f"a step of {whole} in parts; the next larger would peak at {larger}"
    else:
        reasons["micro_batch"] = "the whole batch at once fits"
    if choices.recompute:
        reasons["recompute"] = f"layers run again in backward; without, the peak would be {peak_with(recompute=False)}"
    else:
        reasons["recompute"] = "activations fit; nothing runs twice"
    if choices.kept_heap_bytes:
        reasons["kept_heap_bytes"] = "freed activations stay for the next step: fresh pages cost time"
    else:
        reasons["kept_heap_bytes"] = "freed activations go back at once: no room for holes, or a small step"
    reasons["fill_bytes"] = f"each layer is read once for {format_size(choices.fill_bytes)} of hidden states"
    most = stand_in_row_counts(request)[0]
    if request.config.stand_in_rows is not None and choices.stand_in_rows:
        reasons["stand_in_rows"] = "as given in [chain] stand_in_rows"
    elif choices.stand_in_rows < most:
        twice = peak_with(stand_in_rows=min(most, 2 * choices.stand_in_rows))
        reasons["stand_in_rows"] = f"of {most} that a map of this width repays; twice as many would peak at {twice}"
    elif most:
        reasons["stand_in_rows"] = "as many as a map of this width repays"
    return reasons


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
    if config.method == "flora":  # the sum of products beside every projection, there and here, and old and new
        attention, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        held += 4 * shape.num_layers * shape.hidden_size * (attention + keys)
    updates = config.clients_per_round * trained  # as they wait to be averaged
    return F32 * (held + 5 * trained + updates)
